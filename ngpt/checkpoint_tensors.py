"""Tensors of a distributed checkpoint, one at a time and in one process, whatever layout saved them."""

import io
from pathlib import Path

import torch
from torch import Tensor

from ngpt.checkpoint_metadata import METADATA_FILE, read_metadata, refusal
from ngpt.config.errors import ConfigError

MASTER_PREFIX = "optimizer.state.param."  # the distributed optimizer's; without one, masters are the model's fp32 weights


class CheckpointTensors:
    """The tensors of an iteration folder by name. Reading one takes the memory of that tensor, twice where several ranks saved it.

    Args:
        folder: `iter_%07d`.

    Attributes:
        sizes: name -> shape of the whole tensor, as all ranks together saved it.

    Raises:
        ConfigError: its index is damaged, or names a forbidden class.
    """

    def __init__(self, folder: Path) -> None:
        index = read_metadata(folder)
        self.folder = folder
        self._entries = {name: entry for name, entry in index.state_dict_metadata.items() if hasattr(entry, "chunks")}
        self.sizes = {name: tuple(entry.size) for name, entry in self._entries.items()}
        self._places: dict[str, list] = {}
        for place, stored in index.storage_data.items():
            self._places.setdefault(place.fqn, []).append((place.offset, stored))

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].properties.dtype

    def master(self, name: str) -> str:
        """The name of a weight's fp32 master, whole or in parts (`name.z`, ...); the weight's own name if it has no other master."""
        master = MASTER_PREFIX + name
        return master if master in self.sizes or any(found.startswith(f"{master}.") for found in self.sizes) else name

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU.

        Raises:
            ConfigError: it is not there, a part is missing, or a shard cannot be read.
        """
        if name not in self._entries:
            rule = "The model of the checkpoint's config has this tensor"
            raise ConfigError(str(self.folder), f"no {name}", rule, "Restore the folder from a copy, or take another checkpoint")
        entry = self._entries[name]
        if len(entry.chunks) == 1:
            return self._load(name, self._places[name][0][1], entry.chunks[0].sizes)
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        places = {tuple(offset): stored for offset, stored in self._places[name]}
        covered = 0
        for chunk in entry.chunks:
            part = self._load(name, places[tuple(chunk.offsets)], chunk.sizes)
            whole[tuple(slice(start, start + length) for start, length in zip(chunk.offsets, chunk.sizes, strict=True))] = part
            covered += part.numel()
        if covered != whole.numel():
            got = f"its parts of {name} have {covered:,} of {whole.numel():,} entries"
            raise ConfigError(str(self.folder / METADATA_FILE), got, "Every entry was saved once", "Take another checkpoint")
        return whole

    def _load(self, name: str, stored, size: torch.Size) -> Tensor:
        path = self.folder / stored.relative_path
        try:
            with open(path, "rb") as file:
                tensor = torch.load(io.BufferedReader(_Part(file, stored.offset, stored.length)), map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a damaged archive can raise anything
            raise refusal(path, error) from None
        if not isinstance(tensor, Tensor) or tensor.shape != size:
            raise refusal(path, ValueError(f"{name} is not of the size that the index tells"))
        return tensor


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file of their own."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = min(max(start + offset, 0), self._length)
        return self._position

    def readinto(self, buffer) -> int:
        self._file.seek(self._offset + self._position)
        view = memoryview(buffer)
        count = self._file.readinto(view[: self._length - self._position])
        self._position += count
        return count
