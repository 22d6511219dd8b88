"""Retraction: every marked matrix gets unit norm along the residual stream's dimension, whole or cut into flat shards.

A matrix says how it is normalised through the attribute `unit_dim` of its parameter: 1 where its rows live in the residual stream (they
read it), 0 where its columns do (they write it). Tensor parallelism never cuts that dimension, a distributed optimizer's shards do. The
matrices of several experts may be stacked in one parameter, which says how many in `num_matrices`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ngpt.kernels.retract import AllReduce, MatrixShard, Plan, make_plan

__all__ = [
    "MatrixShard",
    "Retraction",
    "is_free",
    "is_marked",
    "leave_free",
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
    """A piece of a marked weight as a piece of each of its matrices, empty where it has nothing of one.

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


def leave_free(weight: Tensor) -> None:
    """Say that a matrix which touches the residual stream is meant to have no unit norm: nobody forgot to mark it."""
    weight.is_free = True


def is_free(weight: Tensor) -> bool:
    return getattr(weight, "is_free", False)


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
    """`retract_shards_` again and again, of shards that stay where they are, at little cost to the host.

    Args:
        find_shards: called for the shards before the first retraction, and before another one when they have moved.
        find_addresses: where they are now: equal as long as every shard's values have the same address. It is asked every time.
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
