"""Retraction: every marked matrix gets unit norm along the residual stream's dimension, whole or cut into flat shards.

A matrix says how it is normalised through the attribute `unit_dim` of its parameter: 1 where its rows live in the residual stream (they
read it), 0 where its columns do (they write it). Tensor parallelism never cuts that dimension, a distributed optimizer's shards do.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ngpt.functional import EPSILON

UNIT_DIM = "unit_dim"


def mark(weight: Tensor, unit_dim: int) -> None:
    """Mark a [rows, cols] weight for retraction along `unit_dim` (0 or 1)."""
    assert weight.dim() == 2 and unit_dim in (0, 1)
    setattr(weight, UNIT_DIM, unit_dim)


def leave_free(weight: Tensor) -> None:
    """Say that a matrix which touches the residual stream is meant to have no unit norm: nobody forgot to mark it."""
    weight.is_free = True


def is_free(weight: Tensor) -> bool:
    return getattr(weight, "is_free", False)


def is_marked(weight: Tensor) -> bool:
    return hasattr(weight, UNIT_DIM)


@dataclass(frozen=True)
class MatrixShard:
    """A contiguous piece of a row-major [rows, cols] matrix: elements start .. start + values.numel() of its flat form.

    Attributes:
        values: flat fp32 view of the master weights; empty where this rank owns nothing of the matrix.
        start: first element's position in the flat matrix.
        rows, cols: shape of the whole matrix (of this tensor-parallel rank).
        unit_dim: 1: rows get unit norm; 0: columns do.
    """

    values: Tensor
    start: int
    rows: int
    cols: int
    unit_dim: int

    @property
    def num_vectors(self) -> int:
        """How many vectors of the matrix have a norm."""
        return self.rows if self.unit_dim == 1 else self.cols

    def pieces(self) -> Iterable[tuple[Tensor, slice]]:
        """(block [r, c], its vectors), at most three: an incomplete first row, the whole rows between, an incomplete last row."""
        position, left = self.start, self.values
        while left.numel():
            row, col = divmod(position, self.cols)
            if col or left.numel() < self.cols:
                size, whole = min(self.cols - col, left.numel()), 1
            else:
                whole = left.numel() // self.cols
                size = whole * self.cols
            block = left[:size].view(whole, -1)
            yield block, slice(row, row + whole) if self.unit_dim == 1 else slice(col, col + block.size(1))
            position, left = position + size, left[size:]


@torch.no_grad()
def retract_shards_(shards: list[MatrixShard], all_reduce: Callable[[Tensor], None] | None = None) -> None:
    """Divide every vector of the sharded matrices by its norm, in place.

    Args:
        shards: this rank's pieces, the same matrices in the same order on every rank of the group.
        all_reduce: sums a flat fp32 tensor over the ranks that share the matrices; called once. None where nothing is cut.

    Parallelism: one all-reduce of sum(num_vectors) fp32 numbers.
    """
    if not shards:
        return
    sizes = [shard.num_vectors for shard in shards]
    square_sums = torch.zeros(sum(sizes), dtype=torch.float32, device=shards[0].values.device)
    # A batched operation takes one piece of every matrix: the pieces of one matrix may belong to the same vectors.
    turns: tuple[list[tuple[Tensor, Tensor, int]], ...] = ([], [], [])
    for shard, sums in zip(shards, square_sums.split(sizes), strict=True):
        for turn, (block, vectors) in zip(turns, shard.pieces(), strict=False):
            turn.append((block, sums[vectors], shard.unit_dim))
    for turn in filter(None, turns):
        squares = [torch.linalg.vector_norm(block, dim=unit_dim) for block, _, unit_dim in turn]
        torch._foreach_mul_(squares, squares)
        torch._foreach_add_([sums for _, sums, _ in turn], squares)
    if all_reduce is not None:
        all_reduce(square_sums)
    square_sums.add_(EPSILON).rsqrt_()  # from here on the views in `turns` are the factors
    for turn in filter(None, turns):
        torch._foreach_mul_([block for block, _, _ in turn], [factors.unsqueeze(unit_dim) for _, factors, unit_dim in turn])


@torch.no_grad()
def retract_weights_(weights: Iterable[Tensor]) -> None:
    """Retract whole marked weights of any dtype in place, computing in fp32. Unmarked weights are left alone."""
    for weight in weights:
        if is_marked(weight):
            wide = weight.data.float().reshape(-1)
            retract_shards_([MatrixShard(wide, 0, *weight.shape, unit_dim=weight.unit_dim)])
            weight.data.copy_(wide.view_as(weight))
