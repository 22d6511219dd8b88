"""Atomic writes: after an interruption, even a loss of power, a file has its old content or the new one."""

import ctypes
import errno
import itertools
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux


def sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP):
            return  # a file system that flushes its folders itself
        raise OSError(error.errno, error.strerror, str(path)) from error  # fsync does not name the file
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Writes a file under its final name and flushes it. The caller flushes the folder."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
    sync(path)


@contextmanager
def replacing(path: Path, synced: bool = True, alone: bool = False) -> Iterator[BinaryIO]:
    """Opens a file beside `path` for writing, and gives it that name in one step when the block ends without an error.

    Readers see the old content or the whole new one, even with several writers. After an error the file beside it is removed: on a
    full disk the next try needs its space.

    Args:
        synced: file and name are flushed to the disk.
        alone: no other process writes it, so the file beside it needs no unique name.

    Raises:
        OSError: it cannot be written. The error names `path`, which the system leaves out for a full disk.
    """
    writer = "" if alone else f".{socket.gethostname()}.{os.getpid()}"
    partial = path.with_name(f".{path.name}{writer}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            if synced:
                os.fsync(stream.fileno())
        partial.replace(path)
        if synced:
            sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(partial)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def new_folder(path: Path, alone: bool = False) -> Iterator[Path]:
    """Makes a folder beside `path` to write into, and gives it that name when the block ends without an error; after one it is removed.

    Args:
        path: does not exist. Folders above it are made.
        alone: no other process writes it, so the folder beside it needs no unique name (`partial_folder`).
    """
    partial = partial_folder(path)
    if not alone:
        partial = partial.with_name(f"{partial.name}-{socket.gethostname()}-{os.getpid()}")
    partial.mkdir(parents=not alone)
    try:
        yield partial
        for written in [*partial.rglob("*"), partial]:
            sync(written)
        partial.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_folder(path: Path) -> Path:
    """Where the only writer of a new folder writes until it is whole."""
    return path.with_name(f"{path.name}.partial")


def exchange(first: Path, second: Path) -> bool:
    """Swaps the names of two paths in one step. False, with nothing changed, where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def keep_aside(path: Path) -> Path:
    """Renames a file to NAME.keptN.SUFFIX, or a folder to NAME.keptN, with the first N that is free. Returns where it is now."""
    name, suffix = (path.stem, path.suffix) if path.is_file() else (path.name, "")  # that of a folder may hold the dot of a number
    kept = next(place for number in itertools.count(1) if not (place := path.with_name(f"{name}.kept{number}{suffix}")).exists())
    return path.rename(kept)


def last_lines(path: Path, most: int = 1 << 16, start: int = 0) -> list[str]:
    """The last lines of a text file, without reading all of it; [] if it cannot be read. The first line may be cut.

    Args:
        most: bytes to read at most. start: offset before which nothing is read.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - most))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
