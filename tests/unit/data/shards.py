"""Whether a preparation that was interrupted takes up its finished shards, or makes them again."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ngpt.data.encode import load_shard, save_shard
from ngpt.data.indexed import IndexedReader

MARK = 255  # a byte that no UTF-8 text holds


def mark_finished(out: Path) -> int:
    """Changes one token of every finished shard; how many there are."""
    paths = sorted(out.glob(".prepare/*.npz"))
    for path in paths:
        shard = load_shard(path)
        tokens = shard.tokens.copy()
        tokens[0] = MARK
        save_shard(path, replace(shard, tokens=tokens))
    return len(paths)


def assert_marks_were_taken_up(out: Path, whole: Path, marks: int) -> None:
    """All of these marks are in the result, and nothing else differs from a preparation that was never interrupted."""
    found, wanted = (
        np.concatenate([IndexedReader(folder / split).tokens for split in ("train", "valid", "test") if (folder / f"{split}.idx").exists()])
        for folder in (out, whole)
    )
    assert marks > 0 and (found == MARK).sum() == marks
    assert np.array_equal(np.where(found == MARK, wanted, found), wanted)
