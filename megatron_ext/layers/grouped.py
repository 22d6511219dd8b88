"""The linears of all experts of a rank, with their matrices stacked in one parameter. The experts' scales are stacked likewise.

Each parameter costs host time in every backward pass, in the optimizer and in the communication of gradients, and a layer has up to
hundreds of experts. Checkpoints hold the same entries as `SequentialMLP`'s: a tensor with a slice for each expert.
"""

from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name, set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor, nn

from megatron_ext.layers.linear import ReadsStream
from megatron_ext.layers.scale import ParallelScale
from megatron_ext.precision.executors import QuantizableGrouped
from megatron_ext.precision.grouped import grouped_linear


class _StackedLinear(nn.Module):
    """y = x W_e^T of each token's expert e: [tokens, in] of this rank's experts, sorted by expert, to [tokens, out].

    Args:
        num_gemms: experts of this rank.
        input_size, output_size: of a whole expert, before the tensor-parallel group cuts its features.
        pg_collection: its groups of expert and expert tensor parallelism, and of the ranks that hold the same experts.

    Attributes:
        weight: [experts * out, in] of this rank.

    Parallelism: none in the forward pass: Megatron's token dispatcher communicates.
    """

    cut_dim: int  # of an expert's matrix, over the tensor-parallel group

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], object],
        bias: bool,
        pg_collection,
        **_,
    ):
        super().__init__()
        assert not bias, "models of this project have no biases"
        shape, ranks = [output_size, input_size], pg_collection.expt_tp.size()
        shape[self.cut_dim] = divide(shape[self.cut_dim], ranks)
        self.splits_halves = self.cut_dim == 0 and config.gated_linear_unit  # as checkpoints hold a gated first linear
        self.groups = pg_collection
        empty = torch.empty(num_gemms * shape[0], shape[1], device=torch.cuda.current_device(), dtype=config.params_dtype)
        self.weight = nn.Parameter(empty)
        set_tensor_model_parallel_attributes(self.weight, True, self.cut_dim, 1)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                for matrix in self.weight.chunk(num_gemms):
                    init_method(matrix)

    def forward(self, x_TK: Tensor, sizes: list[int]) -> tuple[Tensor, None]:
        """Args: sizes: tokens of each expert, 0 for some."""
        return grouped_linear(x_TK, self.weight, sizes), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Each expert's matrix is a slice of one tensor [all experts, out, in]. Experts that run one by one also ask for an extra state."""
        assert not (metadata or {}).get("singleton_local_shards"), "experts are slices of one tensor"
        halves, key, groups = 2 if self.splits_halves else 1, f"{prefix}weight", self.groups
        state = {key: slice_by_expert(key, self.weight, self.num_matrices, groups, sharded_offsets, self.cut_dim, halves)}
        replica_id = (0, groups.expt_tp.rank(), groups.expt_dp.rank())
        for expert in range(self.num_matrices):
            place = (len(sharded_offsets), groups.ep.rank() * self.num_matrices + expert, groups.ep.size() * self.num_matrices)
            extra = make_sharded_object_for_checkpoint(None, f"{prefix}_extra_state", (*sharded_offsets, place), replica_id)
            state[f"{prefix}_extra_state{expert}"] = extra
        return state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        for expert in range(self.num_matrices):
            state_dict.pop(f"{prefix}_extra_state{expert}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class GroupedColumn(QuantizableGrouped, _StackedLinear):
    """The first linears: the experts' output features are cut over their tensor-parallel group."""

    cut_dim = 0


class GroupedRow(QuantizableGrouped, _StackedLinear):
    """The second linears: the experts' input features are cut."""

    cut_dim = 1


class ExpertScales(ParallelScale):
    """A scale vector for each expert of this rank, in one parameter: [experts * features] flat, expert by expert.

    Args:
        experts: of this rank.
        like: the first linear's weight, which holds all of them.
        pg_collection: its groups of expert and expert tensor parallelism, and of the ranks that hold the same experts.
        split_halves: see `ParallelScale`.
    """

    def __init__(self, experts: int, like: nn.Parameter, pg_collection, split_halves: bool):
        groups = dict(tp_group=pg_collection.expt_tp, sharded=True, like=like)
        super().__init__(like.size(0), init=1.0, scale=1.0, split_halves=split_halves, **groups)
        self.experts, self.groups = experts, pg_collection

    def forward(self, times: float = 1.0) -> tuple[Tensor, float]:
        """As `ScaledParameter`, with a row [experts, features] for each expert."""
        stored, factor = super().forward(times)
        return stored.view(self.experts, -1), factor

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Each expert's vector is a slice of one tensor [all experts, features], like its weight; so are its halves."""
        halves, key = 2 if self.split_halves else 1, f"{prefix}stored"
        return {key: slice_by_expert(key, self.stored, self.experts, self.groups, sharded_offsets, 0, halves)}


class GroupedScaledReadsStream(ReadsStream):
    """The first linear of experts: u, raw. It owns a suv for each expert; `Activates` multiplies by them."""

    def __init__(self, num_gemms: int, *args, config: TransformerConfig, pg_collection, **kwargs):
        super().__init__(num_gemms, *args, config=config, pg_collection=pg_collection, **kwargs)
        self.suv = ExpertScales(num_gemms, self.weight, pg_collection, split_halves=config.gated_linear_unit)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return state | self.suv.sharded_state_dict(f"{prefix}suv.", sharded_offsets, metadata)


def slice_by_expert(
    key: str, param: nn.Parameter, experts: int, groups, sharded_offsets: tuple, cut_dim: int, halves: int
) -> ShardedTensorFactory:
    """What a checkpoint holds of this rank's stacked expert tensors: slices of one tensor, along an extra leading axis.

    Args:
        cut_dim: the dimension of an expert's tensor that is cut over the tensor-parallel group.
        halves: parts of dimension 0, each cut separately: 2 for the gate and the up projection of a gated MLP.
    """
    axes = len(sharded_offsets)
    all_experts, first = groups.ep.size() * experts, groups.ep.rank() * experts
    rank, ranks = groups.expt_tp.rank(), groups.expt_tp.size()

    def build(key: str, stacked: Tensor, replica_id: tuple, _flattened_range: slice | None) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(
                key,
                half,
                *sharded_offsets,
                (axes, first + expert, all_experts),
                (axes + 1 + cut_dim, rank + index * ranks, halves * ranks),
                replica_id=replica_id,
                prepend_axis_num=axes + 1,
            )
            for expert, own in enumerate(stacked.chunk(experts))
            for index, half in enumerate(own.chunk(halves))
        ]

    return ShardedTensorFactory(key, param, build, torch.cat, replica_id=(0, 0, groups.expt_dp.rank()))
