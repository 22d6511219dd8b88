"""Where results may go: looked at before anything is computed."""

import os
from pathlib import Path

from ngpt.config.errors import ConfigError


def check_place(key: str, path: Path) -> None:
    """Refuses a place for results that cannot be made.

    Args:
        key: the option that names it.
        path: a file or folder that need not exist, nor the folders above it.

    Raises:
        ConfigError: the first folder above it that exists is none, or takes no files.
    """
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        rule = "Is not a folder" if not above.is_dir() else "Takes no files from this user"
        raise ConfigError(key, path, f"{above}: {rule[0].lower()}{rule[1:]}", "Name another place")
