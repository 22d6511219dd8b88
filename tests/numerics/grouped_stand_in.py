"""Plain-torch linears with the interface of Transformer Engine's grouped ones, so that what is built over those runs on a CPU."""

import dataclasses

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from megatron_ext.layers.backend import with_mixin
from megatron_ext.models import builder
from megatron_ext.precision.executors import QuantizableGrouped


class _Grouped(nn.Module):
    """One weight for each expert, `weight<i>`; forward takes tokens sorted by expert and how many each has."""

    def __init__(self, num_gemms: int, input_size: int, output_size: int, *, config, init_method, pg_collection, **_):
        super().__init__()
        self.num_gemms, self.groups = num_gemms, pg_collection
        for index in range(num_gemms):
            weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
            init_method(weight)
            self.register_parameter(f"weight{index}", weight)

    def forward(self, x, sizes):
        parts = zip(x.split(sizes), range(self.num_gemms), strict=True)
        return torch.cat([part @ getattr(self, f"weight{index}").t() for part, index in parts]), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = {}
        for index in range(self.num_gemms):
            first = self.groups.ep.rank() * self.num_gemms
            offsets = (*sharded_offsets, (len(sharded_offsets), first + index, self.groups.ep.size() * self.num_gemms))
            own = make_sharded_tensors_for_checkpoint(
                {f"weight{index}": getattr(self, f"weight{index}")},
                prefix,
                {f"weight{index}": self.axis},
                offsets,
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(own, f"{prefix}weight{index}", f"{prefix}weight")
            state |= own
        return state


class GroupedColumn(_Grouped):
    axis = 0


class GroupedRow(_Grouped):
    axis = 1


def use_grouped_experts(use: bool) -> None:
    """Make the builder put grouped experts over these linears into every model that it builds next, or stop doing so."""
    for name in ("ngpt_stack", "gpt_stack"):
        stack = getattr(builder, name)
        setattr(builder, name, _with_grouped(stack) if use else getattr(stack, "__wrapped__", stack))


def _with_grouped(stack):
    def build(config, options, backend, *rest):
        column, row = (with_mixin(QuantizableGrouped, linear) for linear in (GroupedColumn, GroupedRow))
        backend = dataclasses.replace(backend, grouped_column=column, grouped_row=row)
        return stack(config, options, backend, *rest[:-1], True)

    build.__wrapped__ = stack
    return build
