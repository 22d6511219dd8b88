"""Composing by Hydra, which takes a tenth of a second: what files give is kept, for the next config that chooses the same files.

A sweep, a study or `ngpt estimate --fit` composes many configs that differ in values alone.
"""

import functools
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir

# Hydra has no public function for it. Where it moves, tests/unit/config/test_composition.py fails.
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict

from ngpt.config.containers import plain

_VALUE = re.compile(r"\+{0,2}\w+(\.\w+)+=")
_Composed = tuple[DictConfig, dict[str, Any]]


def composed(overrides: Sequence[str], search_path: str, folders: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Composes a config, interpolations unresolved.

    Args:
        overrides: as Hydra takes them.
        search_path: the override that has Hydra read the user's folders.
        folders: the shipped one, then those of the user.

    Returns:
        The sections, and the file chosen of each group.

    Raises:
        Whatever Hydra raises.
    """
    groups: list[str] = []
    values: list[str] = []
    for override in overrides:
        (values if _VALUE.match(override) else groups).append(override)
    # The place of any other form among the values matters.
    if all(any((folder / override.partition("=")[0]).is_dir() for folder in folders) for override in groups):
        with suppress(Exception):  # Hydra says below what is wrong, as it does with all overrides before it
            config, choices = pickle.loads(_of_files((search_path, *groups), folders[0], tuple(_states(folders))))
            _set(config, values)
            return plain(config), choices
    config, choices = _by_hydra((search_path, *overrides), folders[0])
    return plain(config), choices


def _set(config: DictConfig, values: Sequence[str]) -> None:
    """Sets values as Hydra does once the files are read.

    Raises:
        ValueError: an override gives several values. Others: whatever Hydra raises.
    """
    parsed = OverridesParser.create().parse_overrides(list(values))
    if any(override.is_sweep_override() for override in parsed):
        raise ValueError("several values")
    ConfigLoaderImpl._apply_overrides_to_config(parsed, config)


@functools.lru_cache(maxsize=64)
def _of_files(overrides: tuple[str, ...], shipped: Path, states: tuple[tuple[str, int, int], ...]) -> bytes:
    """The config of files alone, pickled: unpickling makes a copy."""
    return pickle.dumps(_by_hydra(overrides, shipped))


def _states(folders: Sequence[Path]) -> Iterator[tuple[str, int, int]]:
    """What tells whether a file has changed: its name, time and size."""
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            state = path.stat()
            yield str(path), state.st_mtime_ns, state.st_size


def _by_hydra(overrides: tuple[str, ...], shipped: Path) -> _Composed:
    with initialize_config_dir(str(shipped), version_base="1.3"):
        config = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
    choices = plain(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return config, choices
