"""Small file operations that survive an interruption: a file is either complete under its name or not there."""

import hashlib
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from ngpt.files import replacing

READ_BYTES = 1 << 20


def atomic_write(path: Path) -> AbstractContextManager[BinaryIO]:
    """`replacing` for one writer at a time: the next one overwrites what a killed one has begun."""
    return replacing(path, alone=True)


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
