"""Processes that share an evaluation: each has the whole model and reads its part of the texts."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of torch.distributed's world, or this one alone."""

    def __init__(self) -> None:
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place, of tensors of one shape on the CPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def collected(self, found: dict[int, Any]) -> dict[int, Any]:
        """All ranks' entries."""
        if self.size == 1:
            return found
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, found)
        return {number: value for part in parts for number, value in part.items()}
