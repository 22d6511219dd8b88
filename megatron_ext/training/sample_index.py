"""Megatron's datasets with a cache of sample indices that can be trusted.

Upstream names a cached index by path, seed, sequence length and number of samples. It takes whatever file has the name, and writes in
place. Here the name follows the content of the data. An entry has a record of its files, which is written last. Files that differ from
what was written are named and built again. An entry is built in its own folder and moved into place, so launches that share a cache
never read a half-written entry of each other. Two launches that build the same entry write the same bytes.
"""

import copy
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

from ngpt.config import ConfigError
from ngpt.data.files import sha256_of
from ngpt.data.fingerprint import WHOLE_BYTES, changed_block, is_record, record_of
from ngpt.data.manifest import content_of
from ngpt.files import replacing

_BUILDING = ".building-"
_ABANDONED_S = 86_400  # a folder of a build that was killed


class ContentKeyedDataset(GPTDataset):
    """GPTDataset with cached indices that are named by the content of the data instead of its path."""

    def __init__(self, indexed_dataset: Any, dataset_path: str, *arguments: Any):
        super().__init__(indexed_dataset, f"content {content_of(dataset_path)}", *arguments)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        build = super()._build_document_sample_shuffle_indices
        _ensure_entry(self, self.index_split.name, build)
        return build()  # from the cache

    def _get_num_tokens_per_epoch(self) -> int:
        """Upstream first gathers the lengths of all documents into a copy, which takes long for a large corpus."""
        lengths = self.dataset.sequence_lengths
        if len(self.indices) != len(lengths):
            return super()._get_num_tokens_per_epoch()
        return int(np.sum(lengths, dtype=np.int64))


class CheckedBlendedDataset(BlendedDataset):
    """BlendedDataset over `ContentKeyedDataset`s."""

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray]:
        build = super()._build_indices
        _ensure_entry(self, self.split.name, build)
        return build()


class DatasetBuilder(BlendedMegatronDatasetBuilder):
    """The builder; upstream's names its blended dataset itself."""

    @staticmethod
    def build_generic_dataset(cls: Any, *arguments: Any) -> Any:
        return BlendedMegatronDatasetBuilder.build_generic_dataset(CheckedBlendedDataset if cls is BlendedDataset else cls, *arguments)


def damage(folder: Path, base: str) -> str | None:
    """What is wrong with the entry `base` of a cache, "" if there is none; None for an intact one."""
    record_path = folder / f"{base}.json"
    if not record_path.is_file():
        return "" if not any(folder.glob(f"{base}-*.npy")) else f"{record_path} is missing"
    try:
        files = json.loads(record_path.read_bytes())
        if not (isinstance(files, dict) and files and all(name.startswith(f"{base}-") and os.sep not in name for name in files)):
            return f"{record_path} is damaged"
        return next((f"{folder / name} {problem}" for name in files if (problem := _problem(folder / name, files[name]))), None)
    except (ValueError, RecursionError):
        return f"{record_path} is damaged"


def _problem(path: Path, recorded: Any) -> str | None:
    """What is wrong with one file of an entry, in words; None where nothing is."""
    if not path.is_file():
        return "is missing"
    if not isinstance(recorded, list) or len(recorded) != 2:
        return "has no readable record"
    size, content = recorded
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes in place of {size}"
    changed = changed_block(path, content) is not None if is_record(content) else sha256_of(path) != content
    return "was changed" if changed else None


def _record(path: Path) -> list[Any]:
    size = path.stat().st_size
    return [size, sha256_of(path) if size <= WHOLE_BYTES else record_of(path, path.name)]


def _ensure_entry(dataset: Any, split: str, build: Callable[[], Any]) -> None:
    """On rank 0, which builds for all: leaves an intact entry for `dataset` in the cache."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    base = f"{dataset.unique_description_hash}-{type(dataset).__name__}-{split}"
    folder = Path(dataset.config.path_to_cache)
    found = damage(folder, base)
    if found is None:
        return
    if found:
        print(f"note: cached sample index: {found}; it is built again", file=sys.stderr, flush=True)
    try:
        _build_entry(dataset, folder, base, build)
    except OSError as error:
        way_out = "Make room there, or set data.cache_dir to a folder that can be written"
        raise ConfigError("data.cache_dir", folder, f"The sample indices cannot be written ({error})", way_out) from error


def _build_entry(dataset: Any, folder: Path, base: str, build: Callable[[], Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_BUILDING}*"):
        if time.time() - left.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=folder) as building:
        with _cache_in(dataset, building):
            build()
        files = sorted(Path(building).iterdir())
        record = {path.name: _record(path) for path in files}
        for path in files:
            os.replace(path, folder / path.name)
    with replacing(folder / f"{base}.json") as stream:
        stream.write(json.dumps(record).encode())


@contextmanager
def _cache_in(dataset: Any, folder: str) -> Iterator[None]:
    """Within the block, upstream finds an empty cache and fills it."""
    config = dataset.config
    dataset.config = copy.copy(config)
    dataset.config.path_to_cache = folder
    try:
        yield
    finally:
        dataset.config = config
