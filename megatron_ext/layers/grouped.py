"""Linears of all experts of a rank in one call, over Transformer Engine's grouped linears. One weight and one scale for each expert.

Shapes: x_TD tokens sorted by expert; `sizes` says how many each expert has. Checkpoints hold the same entries as `SequentialMLP`'s.
"""

import math

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ext.layers.scale import ParallelScale
from ngpt.functional import l2_normalize, scale_features, scale_groups
from ngpt.optim.retraction import mark


def _weights(linear: nn.Module) -> list[nn.Parameter]:
    return [getattr(linear, f"weight{index}") for index in range(linear.num_gemms)]


class _GroupedReadsStream:
    """Mixin over a column-parallel grouped linear: the rows of each expert's matrix have unit norm."""

    def __init__(self, num_gemms: int, *args, config: TransformerConfig, pg_collection, **kwargs):
        super().__init__(num_gemms, *args, config=config, pg_collection=pg_collection, **kwargs)
        self.width_factor = math.sqrt(config.hidden_size)
        self.activation_dtype = config.params_dtype  # as in ScaledReadsStream: the scales stay fp32
        for weight in _weights(self):
            mark(weight, unit_dim=1)


class GroupedScaledReadsStream(_GroupedReadsStream):
    """u <- suv * u * sqrt(D), with a suv for each expert."""

    def __init__(self, num_gemms: int, *args, config: TransformerConfig, pg_collection, **kwargs):
        super().__init__(num_gemms, *args, config=config, pg_collection=pg_collection, **kwargs)
        self.expert_group, self.replicas = pg_collection.ep, pg_collection.expt_dp
        self.suv = nn.ModuleList(
            ParallelScale(
                weight.size(0),
                init=1.0,
                scale=1.0,
                tp_group=pg_collection.expt_tp,
                sharded=True,
                like=weight,
                split_halves=config.gated_linear_unit,
            )
            for weight in _weights(self)
        )

    def forward(self, x_TD: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor | None]:
        u_TF, bias = super().forward(x_TD, sizes)
        suv_EF = torch.stack([suv() for suv in self.suv])
        return scale_groups(u_TF, suv_EF * self.width_factor, sizes), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Each expert's suv is a slice of one tensor along a first axis of all experts, like its weight."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        experts, first = self.expert_group.size() * self.num_gemms, self.expert_group.rank() * self.num_gemms
        for index, suv in enumerate(self.suv):
            own_prefix, expert = f"{prefix}suv.{index}.", first + index
            if metadata.get("singleton_local_shards", False):
                common_prefix, offsets = f"{expert}.{prefix}suv.", sharded_offsets
            else:
                common_prefix, offsets = f"{prefix}suv.", (*sharded_offsets, (len(sharded_offsets), expert, experts))
            own = suv.sharded_state_dict(own_prefix, offsets, metadata)
            replace_prefix_for_sharding(own, own_prefix, common_prefix)
            for tensor in own.values():
                tensor.replica_id = (*tensor.replica_id[:2], self.replicas.rank())
            state |= own
        return state


class GroupedBorrowedScaleReadsStream(_GroupedReadsStream):
    """u <- suv * u * sqrt(D), with a suv that belongs to all experts of the layer: `lend` gives it."""

    def lend(self, suv: ParallelScale) -> None:
        self.borrowed = (suv,)  # in a tuple: it is no submodule of this linear

    def forward(self, x_TD: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor | None]:
        u_TF, bias = super().forward(x_TD, sizes)
        return scale_features(u_TF, self.borrowed[0]() * self.width_factor), bias


class GroupedWritesStream:
    """Mixin over a row-parallel grouped linear: the columns of each expert's matrix have unit norm."""

    def __init__(self, num_gemms: int, *args, pg_collection, **kwargs):
        super().__init__(num_gemms, *args, pg_collection=pg_collection, **kwargs)
        self.feature_group = pg_collection.expt_tp
        for weight in _weights(self):
            mark(weight, unit_dim=0)


class GroupedNormalizedWritesStream(GroupedWritesStream):
    """Fine-grained normalisation in front of every expert's output projection.

    Parallelism: as `NormalizedWritesStream`, over the expert tensor-parallel group.
    """

    def forward(self, x_TF: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor | None]:
        return super().forward(l2_normalize(x_TF, group=self.feature_group), sizes)
