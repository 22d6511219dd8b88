"""Writes 1 TB of prepared data that takes no space: `python tests/bench/big_data.py FOLDER DOCUMENTS`."""

import sys
from pathlib import Path

import numpy as np

from ngpt.data.files import sha256_of
from ngpt.data.indexed import HEADER, MAGIC, TYPE_CODES, VERSION, bin_path, idx_path
from ngpt.data.manifest import Manifest, SourceInfo, SplitInfo, TokenizerInfo

BYTES = 1 << 40
ITEM = 4  # bytes of a token
PART = 10_000_000  # documents written at a time
SPREAD = 1.2  # of the logarithm of a web document's length


def main(folder: Path, documents: int) -> None:
    """The lengths are log-normal, their sum exact, the tokens all 0; nobody can know the checksum of the .bin."""
    prefix, tokens = folder / "train", BYTES // ITEM
    lengths = np.random.default_rng(0).standard_normal(documents, dtype=np.float32)
    np.exp(lengths * np.float32(SPREAD), out=lengths)
    lengths *= np.float32(tokens / lengths.sum(dtype=np.float64))
    lengths = np.maximum(lengths, 2).astype("<i4")
    lengths[:PART] += np.int32((tokens - int(lengths.sum(dtype=np.int64))) // min(PART, documents))
    lengths[0] += tokens - int(lengths.sum(dtype=np.int64))
    assert lengths.min() > 0
    with idx_path(prefix).open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, TYPE_CODES["int32"], documents, documents + 1))
        lengths.tofile(stream)
        start = 0
        for first in range(0, documents, PART):
            ends = start + ITEM * np.cumsum(lengths[first : first + PART], dtype=np.int64)
            np.concatenate([[start], ends[:-1]]).astype("<i8").tofile(stream)
            start = int(ends[-1])
        for first in range(0, documents + 1, PART):
            np.arange(first, min(first + PART, documents + 1), dtype="<i8").tofile(stream)
    with bin_path(prefix).open("wb") as stream:
        stream.truncate(BYTES)
    split = SplitInfo(documents, tokens, BYTES, BYTES, "0" * 64, idx_path(prefix).stat().st_size, sha256_of(idx_path(prefix)))
    tokenizer = TokenizerInfo("bpe", "none", 4096, 0, "none")
    Manifest(tokenizer, [SourceInfo("none", BYTES, "0" * 64, documents)], {"train": split}, "int32", {}).save(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
