"""Whether a file still holds what was written, by the hashes of some of its blocks.

A corpus of terabytes cannot be read through whenever a job starts. Files of up to `WHOLE_BYTES` can, and are. Of a larger one, `BLOCKS`
blocks are compared, the first and the last among them and the others at scattered places: a file that was written again, cut, zeroed
or moved by a byte is noticed in a second. A single changed byte between the blocks is not: `ngpt data inspect --deep` reads them all.

The record of a file is one line: "NUMBER:HASH NUMBER:HASH ...", the block's number in units of `BLOCK_BYTES` and 8 bytes of BLAKE2b.
"""

import hashlib
import heapq
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BLOCK_BYTES = 64 << 10
BLOCKS = 64
WHOLE_BYTES = 64 << 20
_THREADS = 16  # blocks in flight: on a network file system each waits for the disk


class BlockSampler:
    """The record of a file that is being written, whose length is not known yet: `update` with its bytes in order, then `record`.

    A block's rank is a hash of its number, and the blocks of the lowest ranks so far are kept. So the choice is even over the whole
    file, whatever its length, and does not fall in step with the stripes of a disk array.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._count = 0
        self._chosen: list[tuple[int, int, str]] = []  # (-rank, number, hash): the highest rank on top
        self._first: tuple[int, str] | None = None
        self._last = b""

    def update(self, content: bytes) -> None:
        """The next bytes of the file."""
        joined = memoryview(self._rest + content) if self._rest else memoryview(content)
        whole = len(joined) - len(joined) % BLOCK_BYTES
        for start in range(0, whole, BLOCK_BYTES):
            self._take(joined[start : start + BLOCK_BYTES])
        self._rest = bytes(joined[whole:])

    def record(self) -> str:
        """The record; call it once, at the end."""
        if self._rest:
            self._take(memoryview(self._rest))
        chosen = {number: found for _, number, found in self._chosen}
        if self._first is not None:
            chosen |= {self._first[0]: self._first[1], self._count - 1: _hash(self._last)}
        return _line(chosen)

    def _take(self, block: memoryview) -> None:
        number, self._count, self._last = self._count, self._count + 1, bytes(block)
        if number == 0:
            self._first = (0, _hash(block))
            return
        rank = int.from_bytes(hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest(), "little")
        if len(self._chosen) < BLOCKS - 2:
            heapq.heappush(self._chosen, (-rank, number, _hash(block)))
        elif -rank > self._chosen[0][0]:
            heapq.heapreplace(self._chosen, (-rank, number, _hash(block)))


def record_of(path: Path, seed: str) -> str:
    """The record of a file that is there already.

    Args:
        path: The file.
        seed: Decides which blocks.
    """
    count = -(-path.stat().st_size // BLOCK_BYTES)
    inner = range(1, max(count - 1, 1))
    numbers = {0, count - 1, *random.Random(seed).sample(inner, min(BLOCKS - 2, len(inner)))} if count else set()
    return _line(_hashes(path, sorted(numbers)))


def is_record(value: Any) -> bool:
    """Whether a value read from a file is a record of blocks."""
    entry = r"\d{1,12}:[0-9a-f]{16}"
    return isinstance(value, str) and len(value) <= 100 * BLOCKS and re.fullmatch(f"{entry}( {entry})*", value) is not None


def changed_block(path: Path, record: str) -> int | None:
    """The first byte of a recorded block that the file no longer holds; None where it holds them all."""
    wanted = {int(number): found for number, _, found in (entry.partition(":") for entry in record.split())}
    found = _hashes(path, sorted(wanted))
    return next((number * BLOCK_BYTES for number in found if found[number] != wanted[number]), None)


def _hashes(path: Path, numbers: list[int]) -> dict[int, str]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            blocks = pool.map(lambda number: _hash(os.pread(descriptor, BLOCK_BYTES, number * BLOCK_BYTES)), numbers)
            return dict(zip(numbers, blocks, strict=True))
    finally:
        os.close(descriptor)


def _hash(block: bytes | memoryview) -> str:
    return hashlib.blake2b(block, digest_size=8).hexdigest()


def _line(hashes: dict[int, str]) -> str:
    return " ".join(f"{number}:{found}" for number, found in sorted(hashes.items()))
