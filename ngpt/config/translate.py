"""Hydra's and OmegaConf's exceptions as `ConfigError`, with the nearest valid key or option."""

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationResolutionError, OmegaConfBaseException, ValidationError

from ngpt.config.errors import ConfigError
from ngpt.config.folders import EXPERIMENT
from ngpt.config.schema import Config
from ngpt.config.yaml_lines import Lines, at, unreadable

_SEVERAL = re.compile(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'(?:\n1\. | requires --multirun)", re.DOTALL)
_PACKAGE = "# @package _global_"
_FEW_OPTIONS = 12  # are named in an error, of more the command that lists them
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def translate(error: Exception, config_dirs: Sequence[Path] = ()) -> ConfigError:
    """Turns an exception of the config libraries into the error that the user sees.

    Args:
        config_dirs: Folders of the user: an error in one of their files names the line.
    """
    if isinstance(error, MissingConfigException):
        return _unknown_option(error, config_dirs)
    if isinstance(error, OverrideParseException):
        rule = "An override is key=value, group=name or +key=value"
        return ConfigError(error.override, "Cannot be read", rule, "Add the value, or quote special characters")
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:  # in conf/: `check_file` has read the user's files
        return unreadable(Path(error.problem_mark.name), error, "Correct it")
    if several := _SEVERAL.match(str(error)):
        return _several_values(several[1])
    source = functools.partial(_source, error, config_dirs)
    cause = _omegaconf_cause(error)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        if cause.full_key == EXPERIMENT and (without := _without_package(error, config_dirs)):
            rule = f"The first line of an experiment is `{_PACKAGE}`: its keys are those of the whole config"
            return ConfigError(str(without), f"No line `{_PACKAGE}`", rule, "Add it")
        return _unknown_key(cause, _override_key(error), source)
    if isinstance(cause, ValidationError):
        return _wrong_type(cause, source)
    if isinstance(cause, InterpolationResolutionError):
        rule = "An interpolation must name an existing key"
        return ConfigError(cause.full_key or "config", _first_line(cause), rule, "Correct the ${...}")
    if named := re.match(r"(?:In|Invalid defaults list in) '([^']+)'[:,] (.*)", str(error)):
        path = _file_of(named[1], config_dirs) or f"{named[1]}.yaml"
        return ConfigError(str(path), named[2], "Files must compose", "Correct it there")
    return ConfigError(_override_key(error) or "config", _first_line(error), "The config must compose", "Correct the override or file")


def leaf_types(section: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, declared type) of every value of the schema."""
    hints = typing.get_type_hints(section)
    for entry in dataclasses.fields(section):
        kind = hints[entry.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from leaf_types(kind, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, kind


def _several_values(word: str) -> ConfigError:
    """`train.seed=1,2` or `train.seed=range(1,4)`, for which Hydra would start a run per value."""
    key, _, values = word.partition("=")
    if typing.get_origin(dict(leaf_types()).get(key.lstrip("+"))) is list:
        return ConfigError(key, values, "A list stands in brackets", f"Set {key}=[{values}]")
    rule = "Several values are several runs, and a command starts one"
    return ConfigError(key, values, rule, "ngpt train -m and ngpt launch -m make a run of each; in quotes it is one text")


def _unknown_key(cause: OmegaConfBaseException, override: str | None, source: Callable[[str], str]) -> ConfigError:
    key = cause.full_key or override or "config"
    section = cause.object_type
    siblings = [entry.name for entry in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []
    parent, _, name = key.rpartition(".")
    if not parent:
        siblings.append(EXPERIMENT)
    if override and not f"{override}.".startswith(f"{key}.") and not key.startswith(f"{override}."):
        # Inside an entry of a list, OmegaConf does not know the path to the entry.
        parent = override
    leaves = [leaf for leaf, _ in leaf_types()]
    near = [f"{parent}.{sibling}" if parent else sibling for sibling in difflib.get_close_matches(name, siblings, n=3, cutoff=0.6)]
    near += [leaf for leaf in leaves if leaf.rpartition(".")[2] == name]
    near = near or difflib.get_close_matches(key, leaves, n=2, cutoff=0.7)
    known = ", ".join(siblings)
    way_out = f"Did you mean {' or '.join(dict.fromkeys(near))}?" if near else f"Keys of {parent or 'the config'}: {known}"
    path = f"{parent}.{name}" if parent else key
    return ConfigError(path, f"Unknown key{source(path)}", "Only keys of ngpt/config/schema.py exist", way_out)


def section_error(key: str, value: Any, source: str = "") -> ConfigError:
    """The error for a value where the config has a section."""
    return ConfigError(key, f"{value!r}{source}", f"{key} is a section of the config", f"Set {key}.KEY=VALUE")


def _wrong_type(cause: ValidationError, source_of: Callable[[str], str]) -> ConfigError:
    key = cause.full_key or "config"
    source = source_of(key)
    kind = dict(leaf_types()).get(key)
    if key in (entry.name for entry in dataclasses.fields(Config)) or any(leaf.startswith(f"{key}.") for leaf, _ in leaf_types()):
        return section_error(key, cause.value, source)
    if key.startswith(("data.train", "data.valid")):
        rule, example = "Must be a list of {path, weight}", "'data.train=[{path: data/x/train, weight: 1}]'"
        return ConfigError(key, f"{cause.value!r}{source}", rule, f"For instance {example}")
    expected = _describe(kind)
    rule = f"Must be {expected}" if expected else _first_line(cause)
    return ConfigError(key, f"{cause.value!r}{source}", rule, f"Set {key} to {expected or 'a valid value'}")


def _unknown_option(error: MissingConfigException, config_dirs: Sequence[Path]) -> ConfigError:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    options: Sequence[str] = error.options or []
    near = difflib.get_close_matches(name, options, n=2, cutoff=0.5)
    way_out = f"Did you mean {' or '.join(near)}? " if near else ""
    if len(options) > _FEW_OPTIONS:
        way_out += f"`ngpt list {group}s` shows them" if group == EXPERIMENT else f"`ngpt list {group}` shows them"
    else:
        way_out += f"Choose one of {', '.join(options)}" if options else "Choose one existing file"
    if found := _naming(name, config_dirs):
        name = f"{name} in {found}"
    return ConfigError(group or "config", name, f"No file {error.missing_cfg_file}.yaml in conf/ or a --config-dir", way_out)


def _naming(name: str, config_dirs: Sequence[Path]) -> str | None:
    """FILE:LINE in a user's file that names an option which does not exist. Hydra does not say whose defaults it has followed."""
    for path in (path for folder in config_dirs for path in sorted(Path(folder).rglob("*.yaml"))):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # a folder, or a link to nothing: what Hydra followed was neither
            continue
        for number, line in enumerate(lines, 1):
            if re.search(rf"(?<![\w/]){re.escape(name)}(?!\w)", line.partition("#")[0]):
                return at(path, number)
    return None


def _omegaconf_cause(error: BaseException) -> BaseException | None:
    """The first OmegaConf exception behind one of Hydra's, which quotes it in text only."""
    current: BaseException | None = error
    while current is not None and not isinstance(current, OmegaConfBaseException):
        current = current.__cause__ or current.__context__
    return current


def _override_key(error: Exception) -> str | None:
    match = re.match(r"(?:Could not override '|Error merging override |Ambiguous value for argument ')[+~]*([^'=\s]+)", str(error))
    return match.group(1) if match else None


def _source(error: Exception, config_dirs: Sequence[Path], key: str) -> str:
    """in FILE, where an error arose in one; in FILE:LINE where it is the user's."""
    name = _composing(error)
    if name is None:
        return ""
    path = _file_of(name, config_dirs)
    return f" in {name}.yaml" if path is None else f" in {Lines(path).place(key)}"


def _composing(error: Exception) -> str | None:
    """What Hydra calls the file in which an error arose."""
    match = re.match(r"In '([^']+)': \w+ raised while composing", str(error))
    return match[1] if match else None


def _without_package(error: Exception, config_dirs: Sequence[Path]) -> Path | None:
    """The user's experiment in which an error arose, if it lacks the line that makes its keys those of the whole config."""
    path = _file_of(_composing(error) or "", config_dirs)
    if path is None or re.search(r"^#\s*@package\s+_global_", path.read_text(encoding="utf-8"), re.MULTILINE):
        return None
    return path


def _file_of(name: str, config_dirs: Sequence[Path]) -> Path | None:
    """The file that Hydra calls `name`; None for one that is not the user's."""
    return next((path for folder in config_dirs if (path := Path(folder, f"{name}.yaml")).is_file()), None)


def _describe(kind: Any) -> str | None:
    if isinstance(kind, types.UnionType):
        names = [_describe(part) for part in typing.get_args(kind) if part is not type(None)]
        return " or ".join([*map(str, names), "null"])
    return _TYPE_NAMES.get(kind)


def _first_line(error: BaseException) -> str:
    """The first line of the message of the error or of what led to it; the error's type if all are empty."""
    current: BaseException | None = error
    while current is not None:
        if lines := str(current).strip().splitlines():
            return lines[0]
        current = current.__cause__ or current.__context__
    return type(error).__name__
