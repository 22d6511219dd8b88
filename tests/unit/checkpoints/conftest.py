"""Checkpoint folders as a save leaves them, without a training."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ngpt.checkpoints.hashing import hash_file
from ngpt.checkpoints.manifest import Manifest
from ngpt.checkpoints.publish import make_staging, publish

SHARD = "__0_0.distcp"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def save(folder: Path) -> Callable[..., Path]:
    """Publishes a checkpoint of a step and returns its folder."""

    def save(step: int, shard: bytes | None = None) -> Path:
        staging = make_staging(folder, step)
        (staging / SHARD).write_bytes(shard or b"shard of step %d" % step * 1000)
        (staging / ".metadata").write_bytes(b"\x80\x04 index of " + SHARD.encode())
        (staging / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        written = {SHARD: hash_file(staging / SHARD)}
        return publish(folder, Manifest(step, {}, {"torch": "2.11.0"}, {"consumed_samples": 8 * step}), "run: {}\n", written)

    return save


@pytest.fixture
def save_old(folder: Path) -> Callable[..., Path]:
    """Writes a checkpoint as versions without manifests did."""

    def save(step: int, tracker: bool = True) -> Path:
        path = folder / f"iter_{step:07d}"
        path.mkdir(parents=True)
        (path / SHARD).write_bytes(b"shard" * 100)
        (path / ".metadata").write_bytes(b"\x80\x04 index of " + SHARD.encode())
        (path / "metadata.json").write_text("{}")
        if tracker:
            (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
        return path

    return save
