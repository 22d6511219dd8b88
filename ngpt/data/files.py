"""Small file operations that survive an interruption: a file is either complete under its name or not there."""

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

READ_BYTES = 1 << 20


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for binary writing and move it into place when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def sha256_of(path: Path, bar: tqdm | None = None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
            if bar is not None:
                bar.update(len(block))
    return digest.hexdigest()


def progress(total: int | None, description: str, unit: str = "B") -> tqdm:
    """A progress bar with rate and ETA on stderr; outside a terminal it prints a line at most every 10 seconds."""
    options: dict[str, Any] = {"unit": unit, "unit_scale": True, "smoothing": 0}
    return tqdm(total=total, desc=description, mininterval=0.2 if sys.stderr.isatty() else 10.0, **options)
