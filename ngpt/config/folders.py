"""Folders of config files: the shipped `conf/` and those of a user, laid out like it. A file's first comment says what it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ngpt
from ngpt.config.errors import ConfigError

EXPERIMENT = "experiment"
STUDY = "study"  # its files are not parts of a config (ngpt/config/study.py)


@dataclass(frozen=True)
class Option:
    """A file of a group: what `GROUP=NAME` chooses.

    Attributes:
        description: its first comment; empty where it has none.
    """

    group: str
    name: str
    path: Path
    description: str

    @property
    def word(self) -> str:
        """What chooses it on a command line."""
        return f"{self.group}={self.name}"


def config_dir() -> Path:
    """The shipped `conf/`: inside the installed package, or beside it in a checkout."""
    package = Path(ngpt.__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def options(config_dirs: Sequence[Path] = ()) -> list[Option]:
    """The files of every group, by group and name.

    Args:
        config_dirs: Folders of the user besides the shipped one.
    """
    files = [path for folder in (config_dir(), *config_dirs) for path in Path(folder).glob("*/*.yaml") if path.parent.name != STUDY]
    return [Option(path.parent.name, path.stem, path, description_of(path)) for path in sorted(files, key=lambda path: path.parts[-2:])]


def check_config_dirs(config_dirs: Sequence[Path]) -> None:
    """Checks the user's folders of config files.

    Raises:
        ConfigError: one of them is not a folder.
    """
    for folder in config_dirs:
        if not folder.is_dir():
            raise ConfigError("--config-dir", folder.absolute(), "Must be a folder laid out like conf/", "Create it or correct the path")


def description_of(path: Path) -> str:
    """The first comment of a config file, after those that Hydra reads."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # composing with it reports the error
        return ""
    for line in lines:
        if not line.startswith("#"):
            return ""
        if not line.startswith("# @package"):
            return line.removeprefix("#").strip()
    return ""
