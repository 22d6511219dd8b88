"""The first linear of all experts of a rank in one call, over Transformer Engine's grouped linear.

Every expert has a weight and a scale of its own. Checkpoints hold the same entries as `SequentialMLP`'s.
"""

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ext.layers.linear import ReadsStream
from megatron_ext.layers.scale import ParallelScale


class ExpertScales(ParallelScale):
    """A scale vector for each expert of this rank, in one parameter: [experts * features] flat, expert by expert.

    One parameter, since each one costs host time in every backward pass, and a layer has up to hundreds of experts.

    Args:
        experts: of this rank.
        like: the first linear's weight of one expert.
        pg_collection: its groups of expert and expert tensor parallelism, and of the ranks that hold the same experts.
        split_halves: see `ParallelScale`.
    """

    def __init__(self, experts: int, like: nn.Parameter, pg_collection, split_halves: bool):
        groups = dict(tp_group=pg_collection.expt_tp, sharded=True, like=like)
        super().__init__(experts * like.size(0), init=1.0, scale=1.0, split_halves=split_halves, **groups)
        self.experts, self.expert_group, self.replicas = experts, pg_collection.ep, pg_collection.expt_dp

    def forward(self, times: float = 1.0) -> tuple[Tensor, float]:
        """As `ScaledParameter`, with a row [experts, features] for each expert."""
        stored, factor = super().forward(times)
        return stored.view(self.experts, -1), factor

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Each expert's vector is a slice of one tensor [all experts, features], like its weight; so are its halves."""
        axes, halves = len(sharded_offsets), 2 if self.split_halves else 1
        all_experts, first = self.expert_group.size() * self.experts, self.expert_group.rank() * self.experts
        rank, ranks = self.tp_group.rank(), self.tp_group.size()

        def build(key: str, stored: Tensor, replica_id: tuple, _flattened_range: slice | None) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    half,
                    *sharded_offsets,
                    (axes, first + expert, all_experts),
                    (axes + 1, rank + index * ranks, halves * ranks),
                    replica_id=replica_id,
                    prepend_axis_num=axes + 1,
                )
                for expert, vector in enumerate(stored.chunk(self.experts))
                for index, half in enumerate(vector.chunk(halves))
            ]

        key = f"{prefix}stored"
        return {key: ShardedTensorFactory(key, self.stored, build, torch.cat, replica_id=(0, 0, self.replicas.rank()))}


class GroupedScaledReadsStream(ReadsStream):
    """The first linear of experts: u, raw. It owns a suv for each expert; `Activates` multiplies with them."""

    def __init__(self, num_gemms: int, *args, config: TransformerConfig, pg_collection, **kwargs):
        super().__init__(num_gemms, *args, config=config, pg_collection=pg_collection, **kwargs)
        self.activation_dtype = config.params_dtype  # as in ScaledReadsStream: the scales stay fp32
        self.suv = ExpertScales(num_gemms, self.matrices[0], pg_collection, split_halves=config.gated_linear_unit)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return state | self.suv.sharded_state_dict(f"{prefix}suv.", sharded_offsets, metadata)
