"""The formulas in plain torch: the path of a CPU and of fp64; the kernels are compared with it."""

from collections.abc import Callable

import torch
from torch import Tensor

from ngpt.kernels.normalize.eager import EPSILON
from ngpt.kernels.retract.shards import MatrixShard


class Plan:
    """See `Plan` of the package. Sums are of the values' dtype."""

    def __init__(self, shards: list[MatrixShard]):
        sizes = [shard.num_vectors for shard in shards]
        self._sums = torch.zeros(sum(sizes), dtype=shards[0].values.dtype, device=shards[0].values.device)
        # A batched operation takes one piece of each matrix, since two pieces of one matrix may belong to the same vector.
        turns: tuple[list[tuple[Tensor, Tensor, int]], ...] = ([], [], [])
        for shard, sums in zip(shards, self._sums.split(sizes), strict=True):
            for turn, (block, vectors) in zip(turns, shard.pieces(), strict=False):
                turn.append((block, sums[vectors], shard.unit_dim))
        # (blocks, their sums or factors, those to be multiplied with the blocks, their unit_dims) of every turn
        self._turns = [
            ([block for block, _, _ in turn], [x for _, x, _ in turn], [x.unsqueeze(dim) for _, x, dim in turn], [dim for *_, dim in turn])
            for turn in turns
            if turn
        ]

    def __call__(self, all_reduce: Callable[[Tensor], object] | None) -> None:
        self._sums.zero_()
        for blocks, sums, _, dims in self._turns:
            squares = [torch.linalg.vector_norm(block, dim=dim) for block, dim in zip(blocks, dims, strict=True)]
            torch._foreach_mul_(squares, squares)
            torch._foreach_add_(sums, squares)
        if all_reduce is not None:
            all_reduce(self._sums)
        self._sums.add_(EPSILON).rsqrt_()  # from here on the views are the factors
        for blocks, _, factors, _ in self._turns:
            torch._foreach_mul_(blocks, factors)
