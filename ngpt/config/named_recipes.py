"""The mappings of `precision` on a command line, and the recipes that `precision.layers` names.

Hydra cannot add an entry of a dataclass type to a mapping, and merges where a user means to replace. So the command line's `operands` and
`layers` are set here, after Hydra: a whole mapping replaces the one before.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException

from ngpt.config.errors import ConfigError
from ngpt.config.schema import RecipeConfig

_OF_MAPPING = re.compile(r"\+{0,2}precision\.(?P<path>(?:operands|layers|recipes)\b[^=]*)=", re.DOTALL)
_OPTIONS = {entry.name for entry in fields(RecipeConfig)}


def is_of_mapping(override: str) -> bool:
    """Whether an override is set here and not by Hydra."""
    return _OF_MAPPING.match(override) is not None


def set_mappings(precision: Any, overrides: Sequence[str]) -> None:
    """Sets what a command line says of `precision.operands` and `precision.layers`.

    Args:
        precision: the section, of plain containers; left alone where it is none.
        overrides: of the command line; those of other keys are ignored.

    Raises:
        HydraException: a value that cannot be read.
        ConfigError: a path that goes through a value.
    """
    for override in overrides:
        if (found := _OF_MAPPING.match(override)) and not found["path"].startswith("recipes."):
            _set(precision, found["path"], override)


def add_named_recipes(precision: Any, overrides: Sequence[str], composed: Callable[[Sequence[str]], Any]) -> None:
    """Puts the recipes that `layers` names into `recipes`, so that a resolved config holds all that it trains with.

    What their files say beyond a recipe (the executor, blocks kept in bf16) only holds for a run whose own recipe it is.

    Args:
        precision: the section, of plain containers.
        overrides: of the command line; `precision.recipes.NAME.OPTION=VALUE` are of a named recipe.
        composed: from overrides to the section of a config with them.

    Raises:
        ConfigError: an unknown recipe, one that cannot be given to single layers, or an option that is not read there.
    """
    layers = precision.get("layers") if isinstance(precision, dict) else None
    names = [name for name in layers.values() if isinstance(name, str)] if isinstance(layers, dict) else []
    changes: dict[str, list[tuple[str, str]]] = {}  # name: its changes, each with the whole override
    for override in overrides:
        if (found := _OF_MAPPING.match(override)) and found["path"].startswith("recipes."):
            name, _, option = found["path"].removeprefix("recipes.").partition(".")
            _check_change(name, option, override, names)
            changes.setdefault(name, []).append((option, override))
    for name in dict.fromkeys(names):
        if name in precision["recipes"]:  # written out in a file
            for option, override in changes.get(name, []):
                _set(precision["recipes"][name], option, override)
        else:
            precision["recipes"][name] = _named(name, [override for _, override in changes.get(name, [])], composed)


def _named(name: str, changes: Sequence[str], composed: Callable[[Sequence[str]], Any]) -> dict[str, Any]:
    if not re.fullmatch(r"[\w-]+", name):
        raise ConfigError("precision.layers", name, "Names a recipe by letters, digits, _ and -", "Rename its file, or correct the name")
    own = [change.replace(f"precision.recipes.{name}.", "precision.", 1) for change in changes]
    try:
        section = composed([f"precision={name}", *own])
    except MissingConfigException as error:
        if error.missing_cfg_file != f"precision/{name}":
            raise
        rule = "No recipe of that name in conf/precision or a --config-dir"
        raise ConfigError("precision.layers", name, rule, f"Choose one of {', '.join(error.options or [])}") from error
    if section.get("layers"):
        rule = "That recipe has layers of its own, and those of a run are given once"
        raise ConfigError("precision.layers", name, rule, "Name its recipes in the layers of the run")
    found = {key: _in_place(value, name) for key, value in section.items() if key in _OPTIONS}
    if found.get("format", "none") != "none":
        found["dtype"] = "${precision.dtype}"  # of weights and activations: the run's
    return found


def _in_place(value: Any, name: str) -> Any:
    """A value whose interpolations of `precision` point into the named recipe."""
    if isinstance(value, dict):
        return {key: _in_place(item, name) for key, item in value.items()}
    return value.replace("${precision.", f"${{precision.recipes.{name}.") if isinstance(value, str) else value


def _check_change(name: str, option: str, override: str, names: Sequence[str]) -> None:
    path = f"precision.recipes.{name}"
    if name not in names:
        rule, way_out = "No linear layer has that recipe", f"Set precision.layers={{GLOB: {name}}}, or leave this out"
        raise ConfigError(path, override, rule, way_out)
    if option.partition(".")[0] not in _OPTIONS - {"name", "dtype"}:
        rule = "Is no option of a recipe of some layers: " + ", ".join(sorted(_OPTIONS - {"name", "dtype"})) + " are"
        raise ConfigError(f"{path}.{option}" if option else path, override, rule, "Set it for the run, or leave it out")


def _set(section: Any, path: str, override: str) -> None:
    """Sets the value of an override at a dotted path within a section of plain containers."""
    value = OverridesParser.create().parse_override(override).value()
    *parents, last = path.split(".")
    for parent in parents:
        if not isinstance(section, dict):
            break
        section = section.setdefault(parent, {})
    if not isinstance(section, dict):
        raise ConfigError(override.partition("=")[0], override, "Goes through a value that is no mapping", "Correct the path")
    section[last] = value
