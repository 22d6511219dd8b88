"""Writes that survive a loss of power: a file is whole under its name or not there, and the folder knows it."""

import ctypes
import os
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # fsync does not say of which file
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Writes a file under its own name and flushes it. The folder's list of names is the caller's to flush."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
    sync(path)


def replace_synced(path: Path, text: str) -> None:
    """Replaces a file in one step: its readers see the old content or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    write_synced(partial, text)
    partial.replace(path)
    sync(path.parent)


def exchange(first: Path, second: Path) -> bool:
    """Gives two paths each other's names in one step. False where the system or the file system cannot, and nothing has happened."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0
