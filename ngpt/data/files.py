"""Small file operations that survive an interruption: a file is either complete under its name or not there."""

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

READ_BYTES = 1 << 20


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for binary writing and move it into place when the block ends without an error.

    After an error the temporary file is removed: on a full disk it is the room that the next try needs.

    Raises:
        OSError: It cannot be written; names the file, which the system does not for a full disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def sha256_of(path: Path, bar: tqdm | None = None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return sha256_of_stream(stream, bar)[0]


def sha256_of_stream(stream: BinaryIO, bar: tqdm | None = None) -> tuple[str, int]:
    """SHA-256 of what a stream still holds, in hexadecimal, and its size in bytes."""
    digest, size = hashlib.sha256(), 0
    while block := stream.read(READ_BYTES):
        digest.update(block)
        size += len(block)
        if bar is not None:
            bar.update(len(block))
    return digest.hexdigest(), size


def progress(total: int | None, description: str, unit: str = "B") -> tqdm:
    """A progress bar with rate and ETA on stderr; outside a terminal it prints a line at most every 10 seconds."""
    options: dict[str, Any] = {"unit": unit, "unit_scale": True, "smoothing": 0}
    return tqdm(total=total, desc=description, mininterval=0.2 if sys.stderr.isatty() else 10.0, **options)
