"""Where results may go: looked at before anything is computed."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from ngpt.config.errors import ConfigError


def check_place(key: str, path: Path, is_file: bool = False) -> None:
    """Refuses a place for results that cannot be made.

    Makes a folder of its own there and removes it, since permissions alone do not tell what the system refuses. Leaves nothing.

    Args:
        key: the option that names it.
        path: a folder that need not exist, nor those above it.
        is_file: it is a file, which need not exist either.

    Raises:
        ConfigError: it is a folder where a file is meant, or the reverse; the first folder on its way that exists takes no files.
    """
    way_out = "Name another place"
    folder = path.absolute().parent if is_file else path.absolute()
    nearest = folder
    try:
        if is_file and path.is_dir():
            raise ConfigError(key, path, "Is a folder, and the result is a file", "Name a file in it")
        nearest = _nearest(folder)
        if not nearest.is_dir():
            raise ConfigError(key, path, f"{nearest} is not a folder", way_out)
        os.rmdir(tempfile.mkdtemp(prefix=".place-", dir=nearest))
    except OSError as error:
        raise ConfigError(key, path, f"{nearest} takes no files: {error.strerror}", way_out) from None


def _nearest(folder: Path) -> Path:
    """The folder itself if there is something of its name, else the nearest above it."""
    for place in (folder, *folder.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(place)
            return place
    return folder
