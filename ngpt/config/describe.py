"""What a config is made of, each part with one line: the source of `ngpt list`, `--help`, completion and conf/README.md.

A key's line is the comment before or behind its field; the lines of its values are in `choice`. A section's line is the first sentence
of its dataclass, a file's its first comment (ngpt/config/folders.py). `python -m ngpt.config.describe > conf/README.md` writes them down.
"""

import ast
import dataclasses
import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from omegaconf import MISSING

from ngpt.config.folders import EXPERIMENT, options
from ngpt.config.schema import Config

_KINDS = {int: "whole number", float: "number", bool: "true | false", str: "text", Any: "any"}
MEGATRON = "megatron"
_EXPERIMENTS = "All of a run under one name: files of the groups below, and keys."


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the config.

    Attributes:
        name: its dotted name; entries of mappings and lists have `NAME` and `[]` in it.
        kind: what it takes, in words; for a choice, its values.
        default: as YAML; None: a file of its group sets it, or the user.
        description: one line.
        choices: the values that it takes, or may have in its list, each with one line; empty: not limited to a choice.
    """

    name: str
    kind: str
    default: str | None
    description: str
    choices: Mapping[Any, str]

    @property
    def is_list(self) -> bool:
        return self.kind.startswith("[")

    @property
    def takes(self) -> str:
        """What it takes, and its default where it has one."""
        return self.kind if self.default is None else f"{self.kind} = {self.default}"

    @property
    def section(self) -> str:
        return self.name.partition(".")[0]


def sections() -> dict[str, str]:
    """What can be chosen or set as a whole, with one line each: `experiment`, then the sections of the config."""
    described = {entry.name: _first_sentence(entry.type) for entry in dataclasses.fields(Config) if isinstance(entry.type, type)}
    return {EXPERIMENT: _EXPERIMENTS} | described


def groups() -> dict[str, str]:
    """Those of `sections` that have files to choose from."""
    with_files = {option.group for option in options()}
    return {name: line for name, line in sections().items() if name in with_files}


def keys() -> list[Key]:
    """Every key of the config, in the order of the schema."""
    return list(_keys_of(Config, ""))


def reference() -> str:
    """conf/README.md: every file and every key, in Markdown."""
    lines = [
        "# Files and keys of a config",
        "",
        "Written by `python -m ngpt.config.describe > conf/README.md` from the comments of these files and of `ngpt/config/schema.py`.",
        "`GROUP=NAME` chooses a file, `KEY=VALUE` sets a key; `ngpt list` shows the same. A key without a default is set by its group's",
        "file or by the experiment. Entries of lists are `[]` here, names that are free to choose `NAME`.",
    ]
    all_keys, files = keys(), options()
    for name, line in [*sections().items(), (MEGATRON, "Other arguments of Megatron.")]:
        lines += ["", f"## {name}", "", line]
        if in_group := [(f"`{option.word}`", _escaped(option.description)) for option in files if option.group == name]:
            lines += ["", *_markdown(("file", "says"), in_group)]
        if of_section := [_row(key) for key in all_keys if key.section == name]:
            lines += ["", *_markdown(("key", "takes", "default", "says"), of_section)]
    return "\n".join(lines) + "\n"


def _row(key: Key) -> tuple[str, str, str, str]:
    values = [f"`{'null' if value is None else value}`: {_escaped(line)}" for value, line in key.choices.items()]
    takes = ("a list of these" if key.is_list else "one of these") if values else _escaped(key.kind)
    default = "" if key.default is None else f"`{key.default}`"
    return f"`{key.name}`", takes, default, "<br>".join([_escaped(key.description), *values])


def _escaped(text: str) -> str:
    """Escapes what Markdown would interpret."""
    return re.sub(r"([<*|])", r"\\\1", text)


def _markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]


def _keys_of(section: type, prefix: str) -> Iterator[Key]:
    hints, comments = typing.get_type_hints(section), _comments(section)
    for entry in dataclasses.fields(section):
        kind, name = hints[entry.name], prefix + entry.name
        parts = typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            yield from _keys_of(typing.cast(type, kind), f"{name}.")
            continue
        choices = entry.metadata.get("choices", {})
        yield Key(name, _in_words(kind, choices), _default(entry), comments.get(entry.name, ""), choices)
        for part in parts:
            if dataclasses.is_dataclass(part) and not issubclass(section, typing.cast(type, part)):  # whose keys are the section's own
                yield from _keys_of(typing.cast(type, part), f"{name}[]." if typing.get_origin(kind) is list else f"{name}.NAME.")


def _in_words(kind: Any, choices: Mapping[Any, str]) -> str:
    """A type as a person would write it."""
    if typing.get_origin(kind) is list:
        (part,) = typing.get_args(kind)
        return f"[{_in_words(part, choices)}, ...]"
    if choices:
        return " | ".join("null" if value is None else str(value) for value in choices)
    if isinstance(kind, types.UnionType):
        return " | ".join("null" if part is type(None) else _in_words(part, {}) for part in typing.get_args(kind))
    if typing.get_origin(kind) is dict:
        return f"{{NAME: {_in_words(typing.get_args(kind)[1], {})}, ...}}"
    if dataclasses.is_dataclass(kind):
        return f"{{{', '.join(entry.name for entry in dataclasses.fields(kind)[:2])}, ...}}"
    return _KINDS[kind]


def _default(entry: dataclasses.Field) -> str | None:
    value = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    if value == MISSING:
        return None
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _first_sentence(section: type) -> str:
    return (section.__doc__ or "").partition("\n")[0].split(". ")[0].rstrip(".") + "."


def _comments(section: type) -> dict[str, str]:
    """Field -> the comments before and behind it, those of base classes included."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _comments_of_class(base.__module__, base.__name__)
    return found


def _comments_of_class(module: str, name: str) -> dict[str, str]:
    lines, classes = _source(module)
    return {
        field.target.id: "; ".join(filter(None, (_comment_before(lines, field.lineno), _comment_behind(lines, field))))
        for field in classes[name].body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


@functools.cache
def _source(module: str) -> tuple[list[str], dict[str, ast.ClassDef]]:
    source = inspect.getsource(sys.modules[module])
    return source.splitlines(), {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def _comment_before(lines: list[str], number: int) -> str:
    """The comment in the lines before line `number`, counted from 1."""
    first = number - 1
    while first > 0 and lines[first - 1].strip().startswith("#"):
        first -= 1
    return " ".join(line.strip().removeprefix("#").strip() for line in lines[first : number - 1]).rstrip(".")


def _comment_behind(lines: list[str], field: ast.AnnAssign) -> str:
    """The comment behind a field, on its last line. `ast` counts columns in bytes."""
    assert field.end_lineno is not None and field.end_col_offset is not None
    behind = lines[field.end_lineno - 1].encode()[field.end_col_offset :].decode().strip()
    return behind.removeprefix("#").strip()


if __name__ == "__main__":
    print(reference(), end="")
