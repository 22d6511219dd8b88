"""The user's config files are checked as Hydra reads them: a broken one stops only a config that uses it."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

# Hydra has no public class for a folder, so hydra-core is pinned. One that moves this class fails here, with all tests that compose;
# one that no longer calls `load_config` fails tests/unit/config/test_user_files.py.
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.plugins.config_source import ConfigResult
from omegaconf._utils import get_yaml_loader  # private as well: the loader that Hydra reads files with, which refuses keys given twice

from ngpt.config.errors import ConfigError, ConfigErrors
from ngpt.config.folders import STUDY
from ngpt.config.overrides import numbers_for_text
from ngpt.config.schema import Config
from ngpt.config.study import read_study
from ngpt.config.translate import section_error
from ngpt.config.yaml_limits import check_yaml
from ngpt.config.yaml_lines import Lines, unreadable


class UserFiles(FileConfigSource):
    """A folder of the user on Hydra's search path: user://FOLDER."""

    @staticmethod
    def scheme() -> str:
        return "user"

    def load_config(self, config_path: str) -> ConfigResult:
        check_file(Path(self.path, self._normalize_file_name(config_path)))
        return super().load_config(config_path)


def check_file(path: Path) -> None:
    """Checks one file of a --config-dir.

    Raises:
        ConfigError: It cannot be read, or Hydra would not read it as a person does.
    """
    try:
        check_yaml(path)
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=get_yaml_loader())
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error, "Correct or remove it") from error
    if content is None:
        return
    if not isinstance(content, dict):
        raise ConfigError(f"{path}:1", type(content).__name__, "A config file holds keys with values", "Correct or remove it")
    sections = content if "@package _global_" in text.partition("\n")[0] else {path.parent.name: content}
    none = [key for key in (entry.name for entry in dataclasses.fields(Config)) if not isinstance(sections.get(key, {}), dict | str)]
    errors = numbers_for_text(sections) or [section_error(key, sections[key]) for key in none]
    if errors:
        lines = Lines(path)
        raise ConfigErrors([ConfigError(f"{lines.place(one.path)}: {one.path}", one.got, one.rule, one.way_out) for one in errors])


def broken_files(config_dirs: Sequence[Path]) -> Iterator[tuple[Path, ConfigError]]:
    """The user's files that no config or study can use, each with its first error."""
    for folder in config_dirs:
        for path in sorted(folder.rglob("*.yaml")):
            try:
                (read_study if path.parent == folder / STUDY else check_file)(path)
            except ConfigErrors as error:
                yield path, error.errors[0]
            except ConfigError as error:
                yield path, error
