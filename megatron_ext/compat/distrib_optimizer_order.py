"""The distributed optimizer finds the state of each parameter where one group holds parameters of two dtypes.

Upstream (megatron-core 0.19.2), `core/optimizer/distrib_optimizer.py: DistributedOptimizer._build_optimizer_group_ranges` numbers the
parameters of a group in the order of the gradient buffers, and `_build_model_and_main_param_groups` hands the inner optimizer the fp32
ones first. Where both kinds share a group, saving and loading exchange their states: an error where sizes differ, silence where they are
equal. Here the vectors of one group are fp32 scales of nGPT and bf16 vectors of Mamba mixers.
Reason: a hybrid nGPT in bf16 can be saved and resumed.
Goes when: upstream numbers parameters in the order in which it hands them over.
"""

import functools
from typing import Any

import torch


def install() -> bool:
    """Wraps the function that numbers the parameters."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    upstream = DistributedOptimizer._build_optimizer_group_ranges
    if not hasattr(upstream, "__wrapped__"):
        DistributedOptimizer._build_optimizer_group_ranges = staticmethod(_fp32_first(upstream))
    return True


def _fp32_first(upstream: Any) -> Any:
    @functools.wraps(upstream)
    def build_optimizer_group_ranges(*args: Any, **kwargs: Any) -> tuple[dict, list]:
        places, group_ranges = upstream(*args, **kwargs)
        for index, group_range in enumerate(group_ranges):
            group_range["params"].sort(key=lambda param: param.dtype != torch.float32)  # stable
            places |= {param: (index, order) for order, param in enumerate(group_range["params"])}
        return places, group_ranges

    return build_optimizer_group_ranges
