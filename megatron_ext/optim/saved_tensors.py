"""The rules for tensors that go to a checkpoint's writer: unit norms of the masters that have them, finite numbers everywhere."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from ngpt.checkpoint_tensors import MASTER_PREFIX
from ngpt.optim.retraction import is_marked


@dataclass(frozen=True)
class TensorRules:
    """Name of a master in the checkpoint -> dimension (0, 1) of its matrix along which its vectors have norm 1, up to `tolerance`."""

    unit_dims: dict[str, int] = field(default_factory=dict)
    tolerance: float = 1e-4


def unit_dims_of(state: dict[str, Any], masters_are_weights: bool) -> dict[str, int]:
    """The masters with unit norms in a state dict that Megatron is about to save, by the names they get in the checkpoint.

    Args:
        masters_are_weights: fp32 models: the weights themselves have them, too, up to rounding of fp32.
    """
    # Not at the top: the process that writes asynchronous saves patches Megatron before it imports it.
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    dims = {}
    for section in (value for key, value in state.items() if key.startswith("model")):
        for sharded in nested_values(extract_sharded_tensors_and_factories(section)[0]):
            if is_marked(sharded.data):
                dims[MASTER_PREFIX + sharded.key] = sharded.data.unit_dim
                if masters_are_weights:
                    dims[sharded.key] = sharded.data.unit_dim
    return dims


@torch.no_grad()
def first_fault(tensors: Iterable[tuple[WriteItem, Tensor]], rules: TensorRules) -> str | None:
    """What is wrong with the first faulty tensor; None if all are right. The tensors are on the CPU."""
    for item, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or tensor.element_size() == 1:  # torch has no arithmetic of float8
            continue
        fault = _norm_fault(item, tensor, rules)
        if fault is None and not _is_finite(tensor):
            fault = f"{int((~torch.isfinite(tensor)).sum()):,} of its {tensor.numel():,} numbers are not finite"
        if fault is not None:
            return f"{item.index.fqn}: {fault}"
    return None


def _norm_fault(item: WriteItem, tensor: Tensor, rules: TensorRules) -> str | None:
    dim = unit_dim_of(item.index.fqn, rules)
    if dim is None or tensor.dim() < 2:
        return None
    chunk, whole = item.tensor_data.chunk.sizes, item.tensor_data.size
    dim -= 2  # counted among the last two; experts and layers come before them
    if chunk[dim] != whole[dim]:  # the chunk holds a part of each vector
        return None
    norms = torch.linalg.vector_norm(tensor, dim=dim, dtype=torch.promote_types(tensor.dtype, torch.float32))
    deviation = (norms - 1).abs().max().item()
    if deviation <= rules.tolerance:
        return None
    return f"its vectors have unit norm up to {deviation:.3g}, and debug.norm_tolerance is {rules.tolerance:g}"


def unit_dim_of(name: str, rules: TensorRules) -> int | None:
    """The dimension with unit norms of a tensor in the checkpoint. A matrix that is cut by rows has a letter behind its name."""
    if name in rules.unit_dims:
        return rules.unit_dims[name]
    stem, _, part = name.rpartition(".")
    return 1 if len(part) <= 2 and rules.unit_dims.get(stem) == 1 else None


def _is_finite(tensor: Tensor) -> bool:
    """One pass without a copy; the sum of squares may overflow though all numbers are finite, so a doubt is checked."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return bool(torch.isfinite(torch.linalg.vector_norm(tensor, dtype=wide))) or bool(torch.isfinite(tensor).all())
