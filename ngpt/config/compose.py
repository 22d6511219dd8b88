"""From `conf/`, user folders and command-line overrides to a checked `Config`."""

import dataclasses
import math
import pickle
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ngpt.config.checks import validate
from ngpt.config.containers import instance_of, plain
from ngpt.config.earlier_blocks import keep_blocks_of_earlier_run
from ngpt.config.errors import ConfigError, ConfigErrors
from ngpt.config.folders import check_config_dirs, config_dir
from ngpt.config.megatron_arguments import of_earlier_run
from ngpt.config.named_recipes import add_named_recipes, is_of_mapping, set_mappings
from ngpt.config.overrides import accepted, check_words, numbers_for_text
from ngpt.config.resolve import resolve
from ngpt.config.schema import Config
from ngpt.config.translate import section_error, translate
from ngpt.config.user_files import UserFiles
from ngpt.config.yaml_limits import check_yaml
from ngpt.config.yaml_lines import Lines, unreadable

_PLAIN = (ValueError, TypeError, AssertionError, RecursionError, OSError)

_SCHEMA = pickle.dumps(OmegaConf.structured(Config))  # unpickling this takes a tenth of the time of making it
ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("largest_divisor", lambda number, limit: largest_divisor(number, limit), replace=True)
OmegaConf.register_new_resolver("not", lambda value: not value, replace=True)
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
    folders = [shipped, *map(Path, config_dirs)]
    search_path = _search_path(shipped, config_dirs)
    check_words(overrides, config_dirs)
    try:
        with initialize_config_dir(str(shipped), version_base="1.3"):
            sections, experiment = _composed(overrides, search_path, folders)
            add_named_recipes(sections["precision"], overrides, lambda words: _composed(words, search_path, folders)[0]["precision"])
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, *_PLAIN) as error:
        # OmegaConf raises plain exceptions for some malformed keys, and a RecursionError for a value that refers to itself. A group's
        # option is a file name, which the system may refuse.
        raise translate(error, config_dirs) from error
    if experiment and isinstance(sections["run"], dict) and sections["run"].get("name") == MISSING:
        sections["run"]["name"] = PurePath(experiment).name
    return _finish(sections, shipped)


def _composed(overrides: Sequence[str], search_path: str, folders: Sequence[Path]) -> tuple[dict[str, Any], str | None]:
    """The sections as Hydra composes them, interpolations unresolved, and the name of the experiment."""
    of_hydra = [accepted(override) for override in overrides if not is_of_mapping(override)]
    composed = hydra_compose("config", overrides=[search_path, *of_hydra], return_hydra_config=True)
    choices = composed.hydra.runtime.choices
    with open_dict(composed):
        del composed["hydra"]
    sections = plain(composed)
    for group, option in choices.items():
        section = sections.get(group)
        # A file with `defaults: [another]` and no name of its own would bring the other's.
        if option is not None and isinstance(section, dict) and section.get("name") != (own := PurePath(option).name):
            if any((folder / group / f"{section.get('name')}.yaml").exists() for folder in folders):
                section["name"] = own
    set_mappings(sections["precision"], overrides)
    return sections, choices.get("experiment")


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
        raise unreadable(path, error, "Restore it or start a new run") from error
    if not loaded:
        way_out = "Restore it: checkpoints/iter_*/config.yaml and launches/ of a run folder hold copies; or start a new run"
        raise ConfigError(str(path), "Empty", "Must hold the sections of a config", way_out)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(str(path), "Not a mapping", "Must hold the sections of a config", "Restore it or start a new run")
    try:
        sections = plain(loaded)
        if isinstance(sections.get("megatron"), dict):
            sections["megatron"] = of_earlier_run(sections["megatron"])
        keep_blocks_of_earlier_run(sections)
        if errors := numbers_for_text(sections):
            raise ConfigErrors(errors)
        return _finish(sections, config_dir())
    except ConfigError as error:
        # The file is at fault, not a command line: cut off in its middle, changed by hand, or of another version.
        found = error.errors if isinstance(error, ConfigErrors) else [error]
        way_out = "Restore the file or start a new run"
        lines = Lines(path)
        raise ConfigErrors([ConfigError(lines.place(one.path), f"{one.path}: {one.got}", one.rule, way_out) for one in found]) from error


def to_yaml(cfg: Config) -> str:
    """The config as YAML; `load` reads it back."""
    return OmegaConf.to_yaml(dataclasses.asdict(cfg))


def dump(cfg: Config, path: Path) -> None:
    """Writes the config as YAML."""
    Path(path).write_text(to_yaml(cfg), encoding="utf-8")


def _finish(sections: Mapping[str, Any], shipped: Path) -> Config:
    """Merges into the typed schema (which refuses what `+key=value` may have added), resolves and checks."""
    for key in (entry.name for entry in dataclasses.fields(Config)):
        if not isinstance(sections.get(key, {}), Mapping):  # an interpolation, for instance
            raise section_error(key, sections[key])
    try:
        typed = OmegaConf.unsafe_merge(pickle.loads(_SCHEMA), sections)  # unsafe for its first argument, which nothing else uses
        missing = sorted(OmegaConf.missing_keys(typed))
        if missing:
            raise ConfigErrors([_missing(key) for key in missing])
        cfg = instance_of(Config, typed)
    except (OmegaConfBaseException, RecursionError) as error:
        raise translate(error) from error
    if errors := list(_untyped_containers(cfg)):
        raise ConfigErrors(errors)
    resolve(cfg)
    validate(cfg)
    return cfg


def _untyped_containers(section: Any, prefix: str = "") -> Iterator[ConfigError]:
    """Errors for lists and mappings of a wrong type, or with wrong entries: OmegaConf does not check what an interpolation names."""
    for name, kind in typing.get_type_hints(type(section)).items():
        value, key, container, of = getattr(section, name), prefix + name, typing.get_origin(kind), typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            yield from _untyped_containers(value, f"{key}.")
        if container not in (list, dict):
            continue
        whole = isinstance(value, container) and all(isinstance(item, of[0]) for item in value)
        if whole and container is dict and of[1] is not Any:
            whole = all(isinstance(item, of[1]) for item in value.values())
        if not whole:
            got = type(value).__name__ if dataclasses.is_dataclass(value) else repr(value)
            yield ConfigError(key, got, f"Must be a {container.__name__} of {of[-1].__name__}", "Correct it")
        elif container is dict and dataclasses.is_dataclass(of[1]):
            for entry, item in value.items():
                yield from _untyped_containers(item, f"{key}.{entry}.")


def _missing(key: str) -> ConfigError:
    way_out = f"Set {key}=VALUE, or choose an experiment"
    if key == "run.name":  # missing whenever no experiment was chosen: said once
        way_out += ", experiment=NAME: `ngpt list experiments` shows them"
    return ConfigError(key, "Not set", "Has no default", way_out)


def _search_path(shipped: Path, config_dirs: Sequence[Path]) -> str:
    """The override that has Hydra read the user's folders, too."""
    folders = [Path(folder).absolute() for folder in config_dirs]
    taken = {path.relative_to(shipped): path for path in shipped.rglob("*.yaml")} if folders else {}
    check_config_dirs(folders)
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            name = path.relative_to(folder)
            if name in taken:
                rule = f"{taken[name]} has the same name, and only one would be read"
                raise ConfigError("--config-dir", path, rule, "Rename the file")
            taken[name] = path
    Plugins.instance().register(UserFiles)
    quoted = ",".join("'user://" + str(folder).replace("'", "\\'") + "'" for folder in folders)
    return f"hydra.searchpath=[{quoted}]"
