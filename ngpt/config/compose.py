"""From `conf/`, user folders and command-line overrides to a checked `Config`."""

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import ngpt
from ngpt.config.checks import validate
from ngpt.config.errors import ConfigError, ConfigErrors
from ngpt.config.megatron_arguments import of_earlier_run
from ngpt.config.overrides import accepted, numbers_for_text, quoted
from ngpt.config.resolve import resolve
from ngpt.config.schema import Config, RecipeConfig
from ngpt.config.translate import leaf_types, section_error, translate
from ngpt.config.yaml_limits import check_yaml

_OF_NAMED_RECIPE = re.compile(r"\+{0,2}precision\.recipes\.(?P<name>[^.=]+)\.(?P<option>.+)", re.DOTALL)
_PLAIN = (ValueError, TypeError, AssertionError, RecursionError, OSError)

ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("largest_divisor", lambda number, limit: largest_divisor(number, limit), replace=True)
OmegaConf.register_new_resolver("fraction", lambda number, part: int(number * part), replace=True)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`: `${largest_divisor:${train.global_batch_size},3}` in a config file.

    Raises:
        ValueError: A number of more than 40 bits, whose divisors would take long to find.
    """
    if not 0 < number < 1 << 40:
        raise ValueError(f"largest_divisor of {number}: it must be positive and below 2**40")
    halves = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return max((size for half in halves for size in (half, number // half) if size <= limit), default=1)


def config_dir() -> Path:
    """The shipped `conf/`: inside the installed package, or beside it in a checkout."""
    package = Path(ngpt.__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Config:
    """Composes, resolves and checks the config of a run.

    Args:
        overrides: Hydra overrides: `experiment=NAME`, `GROUP=NAME`, `key=value`.
        config_dirs: Folders of the user, laid out like `conf/`, searched besides it.

    Returns:
        The config with every derived value filled in, as plain dataclass instances.

    Raises:
        ConfigError: An unknown key or option, a wrong type, a missing value or an impossible combination.
    """
    shipped = config_dir()
    search_path = _search_path(shipped, config_dirs)
    of_named = {override: found for override in overrides if (found := _OF_NAMED_RECIPE.match(override))}
    arguments = [search_path, *(accepted(override) for override in overrides if override not in of_named)]
    try:
        with initialize_config_dir(str(shipped), version_base="1.3"):
            composed = hydra_compose("config", overrides=arguments, return_hydra_config=True)
            experiment = composed.hydra.runtime.choices.get("experiment")
            sections = {key: value for key, value in OmegaConf.to_container(composed).items() if key != "hydra"}
            _add_named_recipes(sections["precision"], search_path, list(of_named.values()))
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, *_PLAIN) as error:
        # OmegaConf answers some malformed keys with plain exceptions, a value that names itself with a RecursionError, and a group's
        # option is a file's name, which the system may refuse.
        raise translate(error) from error
    if experiment and isinstance(sections["run"], dict) and OmegaConf.is_missing(composed.run, "name"):
        sections["run"]["name"] = PurePath(experiment).name
    return _finish(sections, shipped)


def _add_named_recipes(precision: Any, search_path: str, changes: Sequence[re.Match]) -> None:
    """Puts the recipes that `layers` names into `recipes`, so that a resolved config holds all that it trains with.

    What else their files say (the executor, blocks kept in bf16) is of a run that has one as its own recipe.

    Args:
        changes: overrides of options of named recipes.
    """
    layers = precision.get("layers") if isinstance(precision, dict) else None
    layers = layers if isinstance(layers, dict) else {}
    for change in changes:
        if change["name"] not in layers.values():
            rule, way_out = "No linear layer has that recipe", f"Set precision.layers={{GLOB: {change['name']}}}, or leave this out"
            raise ConfigError(f"precision.recipes.{change['name']}", change[0], rule, way_out)
    known = {entry.name for entry in dataclasses.fields(RecipeConfig)}
    for name in dict.fromkeys(layers.values()):
        if not isinstance(name, str) or name in precision["recipes"]:
            continue
        try:
            own = [accepted(f"precision.{change['option']}") for change in changes if change["name"] == name]
            chosen = hydra_compose("config", overrides=[search_path, f"precision={quoted(name)}", *own])
        except MissingConfigException as error:
            rule = "No recipe of that name in conf/precision or a --config-dir"
            raise ConfigError("precision.layers", name, rule, f"Choose one of {', '.join(error.options or [])}") from error
        found = {key: value for key, value in OmegaConf.to_container(chosen.precision).items() if key in known}
        if found.get("format", "none") != "none":
            found["dtype"] = "${precision.dtype}"  # of weights and activations: the run's
        precision["recipes"][name] = found


def load(path: Path) -> Config:
    """Reads a resolved config back (`config.yaml` of a run folder) and checks it again.

    Raises:
        ConfigError: The file is missing, is not YAML, or holds what `compose` would refuse.
    """
    path = Path(path)
    try:
        check_yaml(path)
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(str(path), "No such file", "A run folder holds its config", "Give the config.yaml of a run") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(str(path), error, "Must be a readable YAML file", "Restore it or start a new run") from error
    if not loaded:
        way_out = "Restore it: checkpoints/iter_*/config.yaml and launches/ of a run folder hold copies; or start a new run"
        raise ConfigError(str(path), "Empty", "Must hold the sections of a config", way_out)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(str(path), "Not a mapping", "Must hold the sections of a config", "Restore it or start a new run")
    try:
        sections = OmegaConf.to_container(loaded)
        if isinstance(sections.get("megatron"), dict):
            sections["megatron"] = of_earlier_run(sections["megatron"])
        if errors := numbers_for_text(sections):
            raise ConfigErrors(errors)
        return _finish(sections, config_dir())
    except ConfigError as error:
        # The file is at fault, not a command line: cut off in its middle, changed by hand, or of another version.
        found = error.errors if isinstance(error, ConfigErrors) else [error]
        way_out = "Restore the file or start a new run"
        raise ConfigErrors([ConfigError(str(path), f"{one.path}: {one.got}", one.rule, way_out) for one in found]) from error


def to_yaml(cfg: Config) -> str:
    """The config as YAML; `load` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def dump(cfg: Config, path: Path) -> None:
    """Writes the config as YAML."""
    Path(path).write_text(to_yaml(cfg), encoding="utf-8")


def _finish(sections: Mapping[str, Any], shipped: Path) -> Config:
    """Merges into the typed schema (which refuses what `+key=value` may have added), resolves and checks."""
    for key in (entry.name for entry in dataclasses.fields(Config)):
        if not isinstance(sections.get(key, {}), Mapping):  # an interpolation, for instance
            raise section_error(key, sections[key])
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Config), sections)
        missing = sorted(OmegaConf.missing_keys(typed))
        if missing:
            raise ConfigErrors([_missing(key, shipped) for key in missing])
        cfg = OmegaConf.to_object(typed)
    except (OmegaConfBaseException, RecursionError) as error:
        raise translate(error) from error
    if errors := list(_untyped_containers(cfg)):
        raise ConfigErrors(errors)
    resolve(cfg)
    validate(cfg)
    return cfg


def _untyped_containers(cfg: Config) -> Iterator[ConfigError]:
    """Lists and mappings that are none, or hold values of another type: OmegaConf takes over what an interpolation names as it is."""
    for key, kind in leaf_types():
        container = typing.get_origin(kind)
        if container not in (list, dict):
            continue
        value = functools.reduce(getattr, key.split("."), cfg)
        of = typing.get_args(kind)[0]  # a mapping's keys
        if not isinstance(value, container) or not all(isinstance(item, of) for item in value):
            yield ConfigError(key, repr(value), f"Must be a {container.__name__} of {of.__name__}", "Correct it")


def _missing(key: str, shipped: Path) -> ConfigError:
    way_out = f"Set {key}=VALUE, or choose an experiment"
    if key == "run.name":  # missing whenever no experiment was chosen: list them once
        way_out += f": {', '.join(sorted(path.stem for path in (shipped / 'experiment').glob('*.yaml')))}"
    return ConfigError(key, "Not set", "Has no default", way_out)


def _check_file(path: Path) -> None:
    """Any file of a --config-dir may be read by Hydra."""
    try:
        check_yaml(path)
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        in_root = "@package _global_" in text.partition("\n")[0]
        if isinstance(content, dict) and (errors := numbers_for_text(content if in_root else {path.parent.name: content})):
            raise ConfigErrors([ConfigError(f"{path}: {error.path}", error.got, error.rule, error.way_out) for error in errors])
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), error, "Must be a readable YAML file", "Correct or remove it") from error


def _search_path(shipped: Path, config_dirs: Sequence[Path]) -> str:
    folders = [Path(folder).absolute() for folder in config_dirs]
    taken = {path.relative_to(shipped): path for path in shipped.rglob("*.yaml")}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError("--config-dir", folder, "Must be a folder laid out like conf/", "Create it or correct the path")
        for path in sorted(folder.rglob("*.yaml")):
            name = path.relative_to(folder)
            if name in taken:
                rule = f"{taken[name]} has the same name, and only one would be read"
                raise ConfigError("--config-dir", path, rule, "Rename the file")
            taken[name] = path
            _check_file(path)
    quoted = ",".join("'file://" + str(folder).replace("'", "\\'") + "'" for folder in folders)
    return f"hydra.searchpath=[{quoted}]"
