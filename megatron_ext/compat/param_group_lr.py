"""A replaced learning rate takes effect on resume.

Upstream (megatron-core 0.19.2), `core/optimizer/optimizer.py: MegatronOptimizer._filter_and_reorder_param_groups` and
`core/optimizer/distrib_optimizer.py: DistributedOptimizer.load_state_dict` pair the optimizer's parameter groups with the checkpoint's
by values among which are `max_lr` and `min_lr`, and keep the checkpoint's. With another `lr` or `min_lr` no group finds its own (KeyError
or ValueError), although `override_opt_param_scheduler` promises that the new values win.
Reason: a schedule can be replaced at a checkpoint's step, the one way out that keeps the optimizer's state. Without the override nothing
changes: the scheduler still stops at other values than the checkpoint's.
Goes when: upstream pairs groups without these two, or resumes with another lr under the override.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

_VALUES = ("max_lr", "min_lr")


def install() -> bool:
    """Wraps both functions."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    # Not load_state_dict: without Transformer Engine another patch (distrib_optimizer_load) wraps that one.
    if not hasattr(MegatronOptimizer._filter_and_reorder_param_groups, "__wrapped__"):
        DistributedOptimizer.load_state_dict = _loads_with_own_rates(DistributedOptimizer.load_state_dict)
        pairing = _pairs_with_own_rates(MegatronOptimizer._filter_and_reorder_param_groups)
        MegatronOptimizer._filter_and_reorder_param_groups = staticmethod(pairing)
    return True


def with_own_rates(current: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups with the learning rates of the current ones, where all groups of each share theirs; else as they are.

    Where rates differ between groups they tell the groups apart, and upstream's rule stays.
    """
    rates = {tuple(group.get(name) for name in _VALUES) for group in current}
    if len(rates) != 1 or len({tuple(group.get(name) for name in _VALUES) for group in saved}) != 1:
        return list(saved)
    own = {name: value for name, value in zip(_VALUES, rates.pop(), strict=True) if value is not None}
    return [{**group, **own} for group in saved]


def _loads_with_own_rates(upstream: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(upstream)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        inner = state_dict.get("optimizer")
        if inner and "param_groups" in inner:
            groups = with_own_rates(self.optimizer.param_groups, inner["param_groups"])
            state_dict = {**state_dict, "optimizer": {**inner, "param_groups": groups}}
        upstream(self, state_dict)

    return load_state_dict


def _pairs_with_own_rates(upstream: Callable[..., list[dict]]) -> Callable[..., list[dict]]:
    @functools.wraps(upstream)
    def filter_and_reorder_param_groups(current_groups: list[dict], state_dict_groups: list[dict]) -> list[dict]:
        return upstream(current_groups, with_own_rates(current_groups, state_dict_groups))

    return filter_and_reorder_param_groups
