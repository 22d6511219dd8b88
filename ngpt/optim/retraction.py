"""Retraction divides every row or column of a marked matrix by its norm, so that the vectors along the residual stream have unit norm.

The parameter's attribute `unit_dim` is the dimension that belongs to the residual stream. It is 1 for a matrix that reads the stream, whose
rows get unit norm, and 0 for one that writes to it, whose columns do. Tensor parallelism never cuts this dimension. A distributed optimizer
cuts the flat weight anywhere, so shards of it are retracted together. One parameter may hold the matrices of several experts, stacked by
rows; `num_matrices` says how many.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ngpt.kernels.retract import AllReduce, MatrixShard, Plan, make_plan

__all__ = [
    "MatrixShard",
    "Retraction",
    "is_marked",
    "is_unretracted",
    "leave_unretracted",
    "mark",
    "retract_shards_",
    "retract_weights_",
    "shards_of",
]

UNIT_DIM = "unit_dim"


def mark(weight: Tensor, unit_dim: int, num_matrices: int = 1) -> None:
    """Mark a [num_matrices * rows, cols] weight, matrix above matrix, for retraction of each along `unit_dim` (0 or 1)."""
    assert weight.dim() == 2 and unit_dim in (0, 1) and weight.size(0) % num_matrices == 0
    setattr(weight, UNIT_DIM, unit_dim)
    weight.num_matrices = num_matrices


def shards_of(weight: Tensor, values: Tensor, start: int) -> list[MatrixShard]:
    """Splits a shard of a marked weight into one piece per matrix. A piece is empty where the shard holds nothing of its matrix.

    Args:
        values: flat fp32, elements start .. start + values.numel() of the flat weight.
    """
    rows, cols = weight.size(0) // weight.num_matrices, weight.size(1)
    end, shards = start + values.numel(), []
    for first in range(0, weight.numel(), rows * cols):
        low, high = max(first, start), min(first + rows * cols, end)
        piece = values[low - start : max(low, high) - start]
        shards.append(MatrixShard(piece, low - first if piece.numel() else 0, rows, cols, weight.unit_dim))
    return shards


def leave_unretracted(weight: Tensor) -> None:
    """Declares that a matrix of the residual stream is not retracted on purpose, so that no check takes it for a forgotten one."""
    weight.is_unretracted = True


def is_unretracted(weight: Tensor) -> bool:
    return getattr(weight, "is_unretracted", False)


def is_marked(weight: Tensor) -> bool:
    return hasattr(weight, UNIT_DIM)


@torch.no_grad()
def retract_shards_(shards: list[MatrixShard], all_reduce: AllReduce | None = None) -> None:
    """Divide every vector of the sharded matrices by its norm, in place.

    Args:
        shards: this rank's pieces, the same matrices in the same order on every rank of the group.
        all_reduce: sums a flat fp32 tensor over the ranks that share the matrices; called once. None where nothing is cut.

    Parallelism: one all-reduce of sum(num_vectors) fp32 numbers.
    """
    if shards:
        make_plan(shards)(all_reduce)


class Retraction:
    """Repeats `retract_shards_` on shards that stay where they are in memory, at little cost to the host.

    Args:
        find_shards: returns the shards. Called before the first retraction, and again whenever they have moved.
        find_addresses: returns the address of every shard's values. Called each time, to see whether any has moved.
        all_reduce: as for `retract_shards_`.
    """

    def __init__(
        self,
        find_shards: Callable[[], list[MatrixShard]],
        find_addresses: Callable[[], list[int]],
        all_reduce: AllReduce | None = None,
    ):
        self._find_shards, self._find_addresses, self._all_reduce = find_shards, find_addresses, all_reduce
        self._addresses: list[int] | None = None
        self._plan: Plan | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        addresses = self._find_addresses()
        if addresses != self._addresses:
            shards = self._find_shards()
            self._plan = make_plan(shards) if shards else None
            self._addresses = addresses
        if self._plan is not None:
            self._plan(self._all_reduce)


@torch.no_grad()
def retract_weights_(weights: Iterable[Tensor]) -> None:
    """Retract whole marked weights of any dtype in place, computing in fp32. Unmarked weights are left alone."""
    for weight in weights:
        if is_marked(weight):
            wide = weight.data.float().reshape(-1)
            retract_shards_(shards_of(weight, wide, 0))
            weight.data.copy_(wide.view_as(weight))
