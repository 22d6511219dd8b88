"""Hashes of a checkpoint's files: of bytes on their way to the disk, and of files that are there.

XXH3-128 is not a cryptographic hash. It finds damage, not forgery, at tens of GB/s: the checks take a few percent of a save's time.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

NAME = "xxh3_128"
READ_BYTES = 8 << 20
BLOCK_BYTES = 256 << 10  # of one sampled block
SAMPLED_PART = 0.01  # of a file's bytes are read back, up to the limit that the caller gives
INLINE_BYTES = 64 << 10  # smaller writes are hashed at once: handing them to another thread costs more


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and hash of one file."""

    size: int
    digest: str


def hash_bytes(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(path: Path) -> FileRecord:
    """Reads a whole file. Hashing and reading release the interpreter's lock, so threads can hash several files at once."""
    hasher, size, buffer = xxhash.xxh3_128(), 0, bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            hasher.update(memoryview(buffer)[:count])
            size += count
    return FileRecord(size, hasher.hexdigest())


@dataclass
class Samples:
    """Hashes of blocks spread evenly over a stream of unknown length.

    Args:
        limit: The most blocks that are kept. In a longer stream every second one is dropped.
    """

    limit: int
    stride: int = int(BLOCK_BYTES / SAMPLED_PART)
    blocks: list[tuple[int, int, int]] = field(default_factory=list)  # offset, bytes, hash
    due: int = 0  # where the next block is taken

    def take(self, data: memoryview, offset: int) -> None:
        """Takes in `data`, which lies at `offset` of the stream."""
        while self.due < offset + len(data):
            start = max(self.due, offset)
            block = data[start - offset : start - offset + BLOCK_BYTES]
            self.blocks.append((start, len(block), xxhash.xxh3_64_intdigest(block)))
            self.due = start + self.stride
            if len(self.blocks) > max(self.limit, 1):
                self.blocks, self.stride = self.blocks[::2], 2 * self.stride
                self.due = self.blocks[-1][0] + self.stride

    def first_difference(self, path: Path) -> int | None:
        """The offset of the first sampled block that the disk gives back differently; None where all are as they were written.

        The file must have been flushed to the disk: its pages are dropped first, so that the disk answers and not the memory.
        """
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            for offset, size, digest in self.blocks:
                if xxhash.xxh3_64_intdigest(os.pread(descriptor, size, offset)) != digest:
                    return offset
        finally:
            os.close(descriptor)
        return None


class HashingFile:
    """A new binary file whose bytes are hashed by a thread beside the one that writes them. Written from start to end, without seeking.

    Args:
        path: The file; an existing one is replaced.
        sample_limit: Blocks of it that are kept for reading back, at most.
    """

    def __init__(self, path: str | os.PathLike, sample_limit: int = 256) -> None:
        self.path = Path(path)
        self.samples = Samples(sample_limit)
        self.record: FileRecord | None = None  # once it is closed
        self.error: OSError | None = None  # of the first refused write: torch's zip writer loses it
        self._hasher, self._size = xxhash.xxh3_128(), 0
        self._file = open(path, "wb")  # noqa: SIM115
        self._beside = ThreadPoolExecutor(1)

    def write(self, data: Any) -> int:
        try:
            return self._write(memoryview(data).cast("B"))
        except OSError as error:
            self.error = self.error or error
            raise

    def _write(self, view: memoryview) -> int:
        if len(view) < INLINE_BYTES:
            self._take(view, self._size)
            self._file.write(view)
        else:  # the caller may reuse its memory once this returns, so it returns when both are done
            hashed = self._beside.submit(self._take, view, self._size)
            try:
                self._file.write(view)
            finally:
                hashed.result()
        self._size += len(view)
        return len(view)

    def _take(self, view: memoryview, offset: int) -> None:
        self._hasher.update(view)
        self.samples.take(view, offset)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        """The descriptor, after everything written so far was handed to it: whoever asks wants to fsync."""
        self._file.flush()
        return self._file.fileno()

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            self._file.close()
        finally:
            self._beside.shutdown()
        self.record = FileRecord(self._size, self._hasher.hexdigest())

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hash_files(paths: Iterable[Path], threads: int) -> dict[Path, FileRecord | OSError]:
    """The record of each file, or the error that reading it gave."""

    def record(path: Path) -> FileRecord | OSError:
        try:
            return hash_file(path)
        except OSError as error:
            return error

    paths = list(paths)
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        return dict(zip(paths, pool.map(record, paths), strict=True))
