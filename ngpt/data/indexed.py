"""Megatron's indexed dataset, written and read with numpy alone.

A dataset is two files. PREFIX.bin holds the tokens of all documents, end to end, little-endian. PREFIX.idx holds, in this order:
9 bytes of magic, uint64 version 1, uint8 type code, uint64 number of sequences, uint64 number of document marks,
int32 tokens of each sequence, int64 byte offset of each sequence in the .bin, int64 document marks (index of each document's
first sequence, and the number of sequences at the end). Here a document is one sequence.
"""

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ngpt.config.errors import ConfigError
from ngpt.data.files import atomic_write
from ngpt.data.fingerprint import WHOLE_BYTES, BlockSampler

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TYPE_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
UINT16_VOCAB_LIMIT = 65500
MAX_DOCUMENT_TOKENS = 2**31 - 1


def dtype_for(vocab_size: int) -> np.dtype:
    """The token type that Megatron's own tools choose for a vocabulary."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCAB_LIMIT else np.dtype("<i4")


@dataclass(frozen=True)
class WrittenFiles:
    """What was written: sizes in bytes, SHA-256 checksums, and the hashes of some blocks (of small files none)."""

    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    bin_blocks: str
    idx_blocks: str


def write_indexed(prefix: Path, parts: Iterable[tuple[np.ndarray, np.ndarray]], dtype: np.dtype) -> WrittenFiles:
    """Write PREFIX.bin and PREFIX.idx; each file appears only when it is complete, the index last.

    Args:
        prefix: Path without the suffix; a dot in the name is kept.
        parts: Pairs of the tokens of some documents, end to end, and the number of tokens of each of them.
        dtype: Token type, see `dtype_for`.
    """
    lengths: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    digest, blocks = hashlib.sha256(), BlockSampler()
    with atomic_write(bin_path(prefix)) as stream:
        for tokens, part_lengths in parts:
            block = np.ascontiguousarray(tokens, dtype=dtype).tobytes()
            stream.write(block)
            digest.update(block)
            blocks.update(block)
            lengths.append(part_lengths)
    all_lengths = np.concatenate(lengths)
    index = index_bytes(all_lengths, dtype)
    with atomic_write(idx_path(prefix)) as stream:
        stream.write(index)
    bin_bytes = int(all_lengths.sum()) * dtype.itemsize
    index_blocks = BlockSampler()
    index_blocks.update(index)
    return WrittenFiles(
        bin_bytes=bin_bytes,
        bin_sha256=digest.hexdigest(),
        idx_bytes=len(index),
        idx_sha256=hashlib.sha256(index).hexdigest(),
        bin_blocks=blocks.record() if bin_bytes > WHOLE_BYTES else "",
        idx_blocks=index_blocks.record() if len(index) > WHOLE_BYTES else "",
    )


def index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """The content of an .idx file for documents of these many tokens."""
    count = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    pointers = np.concatenate([np.zeros(1, dtype=np.int64), ends])[:count]
    header = HEADER.pack(MAGIC, VERSION, TYPE_CODES[dtype.name], count, count + 1)
    return b"".join(
        [header, lengths.astype("<i4").tobytes(), pointers.astype("<i8").tobytes(), np.arange(count + 1, dtype="<i8").tobytes()]
    )


class IndexedReader:
    """The documents of a prepared split, memory-mapped: `reader[i]` is the i-th document's tokens.

    Raises:
        ConfigError: A file is missing, is not an indexed dataset, or the two do not belong together.
    """

    def __init__(self, prefix: Path | str) -> None:
        index_path, tokens_path = idx_path(prefix), bin_path(prefix)
        for path in (index_path, tokens_path):
            if not path.is_file():
                raise ConfigError(
                    str(path), "no such file", "A data source is a prefix of a .bin and an .idx file", "Run `ngpt data prepare`"
                )
        # Mapped: the index of a large corpus takes gigabytes, and a reader of a few documents needs little of it.
        content = np.memmap(index_path, np.uint8, mode="r") if index_path.stat().st_size else np.zeros(0, np.uint8)
        if len(content) < HEADER.size or content[: len(MAGIC)].tobytes() != MAGIC:
            raise ConfigError(str(index_path), "not an indexed dataset", "The file must start with its magic bytes", "Prepare it again")
        _, version, code, count, marks = HEADER.unpack_from(content)
        names = {number: name for name, number in TYPE_CODES.items()}
        expected = HEADER.size + 12 * count + 8 * marks
        if version != VERSION or code not in names or marks < 1 or len(content) < expected:
            raise ConfigError(
                str(index_path), f"version {version}, type {code}, {len(content)} bytes", "The index is damaged", "Prepare it again"
            )
        self._path = index_path
        self.dtype = np.dtype(names[code]).newbyteorder("<")
        self.lengths = np.frombuffer(content, "<i4", count, HEADER.size)
        self._pointers = np.frombuffer(content, "<i8", count, HEADER.size + 4 * count)
        self._marks = np.frombuffer(content, "<i8", marks, HEADER.size + 12 * count)
        tokens = int(self.lengths.sum(dtype=np.int64))
        if tokens_path.stat().st_size != tokens * self.dtype.itemsize:
            raise ConfigError(
                str(tokens_path), f"{tokens_path.stat().st_size} bytes", f"The index names {tokens} tokens", "Prepare it again"
            )
        self.tokens = np.memmap(tokens_path, dtype=self.dtype, mode="r") if tokens else np.zeros(0, self.dtype)

    def __len__(self) -> int:
        return len(self._marks) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        first, last = (int(mark) for mark in self._marks[index % len(self) :][:2])
        if not 0 <= first < last <= len(self.lengths):
            raise ConfigError(str(self._path), f"document {index}: sequences {first} to {last}", "The index is damaged", "Prepare it again")
        start, count = int(self._pointers[first]) // self.dtype.itemsize, int(self.lengths[first:last].sum(dtype=np.int64))
        if not 0 <= start <= start + count <= len(self.tokens):
            raise ConfigError(str(self._path), f"document {index} at token {start}", "The index is damaged", "Prepare it again")
        return self.tokens[start : start + count]


def bin_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.idx")
