"""Words of a command line as Hydra reads them. The value of a text key is the text that was typed: 1.10 and true are names, too."""

import difflib
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ngpt.config.errors import ConfigError, ConfigErrors
from ngpt.config.folders import EXPERIMENT, options
from ngpt.config.schema import DataSource
from ngpt.config.translate import leaf_types

_TEXT = (str, str | None)
_LISTS = {key for key, kind in leaf_types() if kind in (list[str], list[DataSource])}


def check_words(overrides: Sequence[str], config_dirs: Sequence[Path]) -> None:
    """Refuses words without a value, and suggests what was meant: `experiment=ngpt_tiny` for `ngpt_tiny`.

    Raises:
        ConfigError: for the first such word.
    """
    for word in overrides:
        if "=" in word or word.startswith("~"):  # ~ removes a key
            continue
        known = _words_of_names(config_dirs)
        names = [word] if word in known else difflib.get_close_matches(word, known, n=2, cutoff=0.7)
        meant = [meaning for name in names for meaning in known[name]]
        way_out = f"Did you mean {' or '.join(meant[:4])}?" if meant else "ngpt list shows experiments, groups and keys"
        raise ConfigError(word, "Cannot be read", "Each word is key=value, group=name or experiment=name", way_out)


def key_of(word: str) -> str:
    """The key that a word sets, without Hydra's marks in front of it."""
    return word.partition("=")[0].lstrip("+~")


def _words_of_names(config_dirs: Sequence[Path]) -> dict[str, list[str]]:
    """What can be named without a value -> the words that it may stand for. An experiment comes before files of the same name."""
    known: dict[str, list[str]] = {}
    files = options(config_dirs)
    for option in sorted(files, key=lambda option: option.group != EXPERIMENT):
        known.setdefault(option.name, []).append(option.word)
    for group in {option.group: None for option in files}:
        known.setdefault(group, []).append(f"{group}=NAME")
    for key, _ in leaf_types():
        for name in (key, key.rpartition(".")[2]):
            known.setdefault(name, []).append(f"{key}=VALUE")
    return known


def accepted(override: str) -> str:
    """An override for Hydra.

    `megatron.NAME=VALUE` and `cluster.environment.NAME=VALUE` may add a key: these groups are open.

    Raises:
        ConfigError: it sets something of Hydra itself, which has no effect here, or gives numbers for a list of texts.
    """
    key, equals, value = override.partition("=")
    name = key_of(override)
    refuse_hydra(key, override)
    if equals and is_text(name) and not (value == "null" and text_keys().get(name)):
        value = quoted(value)
    if equals and name in _LISTS and (errors := numbers_for_text(_nested(name, _parsed(override)))):
        raise ConfigErrors(errors)
    open_group = name.startswith(("megatron.", "cluster.environment.")) or name == "megatron"
    return f"{'++' + name if open_group and not key.startswith('~') else key}{equals}{value}"


def refuse_hydra(key: str, override: str) -> None:
    """Raises a `ConfigError` where a word sets something of Hydra itself."""
    if re.match(r"[+~]*hydra\b", key):
        way_out = "Leave it out: run.name and run.dir name the folder, ngpt train -m --parallel N and ngpt launch -m sweep"
        raise ConfigError(key, override, "Hydra only composes the config here", way_out)


def is_text(key: str) -> bool:
    """Whether the value of a key is the text that was typed."""
    return key in text_keys() or key.startswith("cluster.environment.")


def _parsed(override: str) -> Any:
    """The value of an override, None if Hydra cannot read it, which is reported later."""
    try:
        return OverridesParser.create().parse_override(override).value()
    except (HydraException, RecursionError):
        return None


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def quoted(text: str) -> str:
    """Text as a value of an override, quoted so that Hydra's grammar neither interprets nor refuses it. Quoted text stays as it is."""
    if re.fullmatch(r"'([^'\\]|\\.)*'|\"([^\"\\]|\\.)*\"", text, re.DOTALL):
        return text
    # Backslashes stand for themselves, except before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


@functools.cache
def text_keys() -> dict[str, bool]:
    """Every key of text -> whether it may be null."""
    return {key: kind is not str for key, kind in leaf_types() if kind in _TEXT}


def numbers_for_text(sections: dict[str, Any]) -> list[ConfigError]:
    """Errors for numbers in a file, or in a list on the command line, where the config wants text: the original text is lost."""
    errors = []
    for key, kind in leaf_types():
        value: Any = sections
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if kind in _TEXT:
            found = {key: value}
        elif isinstance(value, list):
            found = {f"{key}[{index}]": item for index, item in enumerate(value) if kind == list[str]}
            found |= {f"{key}[{index}].path": item.get("path") for index, item in enumerate(value) if isinstance(item, dict)}
        else:
            continue
        errors += [
            ConfigError(name, repr(item), "Is text, and YAML reads this as another kind of value", "Put it in quotes")
            for name, item in found.items()
            if isinstance(item, int | float)
        ]
    return errors
