"""Division of every vector of many matrices by its norm, in place: whole matrices, or the shards of a distributed optimizer.

fp32 on CUDA goes through Triton kernels, others (also fp64) through plain torch. Both do what they can when the plan is made.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ngpt.kernels.retract import eager
from ngpt.kernels.retract.shards import MatrixShard
from ngpt.kernels.rows import kernels_take

__all__ = ["AllReduce", "MatrixShard", "Plan", "make_plan"]

AllReduce = Callable[[Tensor], object]


class Plan(Protocol):
    """Shards that are ready to be retracted. The plan knows where their values lie in memory, so they must stay there."""

    def __call__(self, all_reduce: AllReduce | None) -> None:
        """Retract in place.

        Args:
            all_reduce: sums a flat tensor [sum of num_vectors] over the ranks, in place; called once. None: nothing is cut.
        """


def make_plan(shards: list[MatrixShard]) -> Plan:
    """The plan of at least one shard. All are contiguous, of one device and dtype; all ranks list the same matrices in the same order."""
    values = [shard.values for shard in shards if shard.values.numel()] or [shards[0].values.new_zeros(1)]
    if not kernels_take(values[0], fp32=tuple(values)):
        return eager.Plan(shards)
    from ngpt.kernels.retract import triton  # here, since triton may be missing where there is no CUDA

    return triton.Plan(shards)
