"""`ScaledParameter` as a Megatron module, with parallel attributes and checkpoint layout taken from the weight it belongs to."""

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from ngpt.functional import ScaledParameter


class ParallelScale(ScaledParameter):
    """A scale vector that is replicated, sharded, or sharded in two halves.

    Args:
        size: entries on this rank.
        init, scale: see `ScaledParameter`.
        tp_group: tensor-parallel group over which the vector is sharded or replicated.
        sharded: entries are sharded along axis 0 over the group; otherwise every rank holds all of them.
        like: the weight whose rows the entries scale, where there is one: its stride (SwiGLU's two halves) and the gradient group of
            experts are taken over.
        sequence_parallel: replicated scales only: each rank sees part of the tokens, so that the gradient is summed over the group.
        split_halves: a gated MLP's vector (gate, up): each half is sharded on its own in checkpoints, like the weight.
        allow_shape_mismatch: the vocabulary may be padded differently where the checkpoint is loaded.

    Parallelism: Megatron's `sequence_parallel`, `tensor_model_parallel` and `allreduce` attributes make the gradient reductions and
        the gradient norm correct; nothing is communicated here.
    """

    def __init__(
        self,
        size: int,
        init: float,
        scale: float,
        *,
        tp_group: torch.distributed.ProcessGroup,
        sharded: bool = False,
        like: nn.Parameter | None = None,
        sequence_parallel: bool = False,
        split_halves: bool = False,
        allow_shape_mismatch: bool = False,
    ):
        super().__init__(size, init, scale, device=torch.cuda.current_device())
        self.tp_group, self.sharded = tp_group, sharded
        self.split_halves, self.allow_shape_mismatch = split_halves, allow_shape_mismatch
        if sharded:
            set_tensor_model_parallel_attributes(self.stored, True, 0, getattr(like, "partition_stride", 1))
        else:
            self.stored.sequence_parallel = sequence_parallel
        if hasattr(like, "allreduce"):
            self.stored.allreduce = like.allreduce

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """{prefix + "stored": ShardedTensor or its SwiGLU factory}, for Megatron's distributed checkpoints."""
        key = f"{prefix}stored"
        state = make_sharded_tensors_for_checkpoint(
            {"stored": self.stored},
            prefix,
            {"stored": 0} if self.sharded else {},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        state[key].allow_shape_mismatch = self.allow_shape_mismatch
        if self.split_halves:
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets, metadata.get("singleton_local_shards", False))
        return state
