"""Load a checkpoint of the distributed optimizer where Adam is torch's.

Upstream (megatron-core 0.19.2), `core/optimizer/distrib_optimizer.py: DistributedOptimizer`, where neither Transformer Engine nor apex is
installed and torch keeps `step` as one tensor per parameter:
- `state_dict` asserts that all parameters hold the same `step`, also before the first step, when there is no state at all: every load,
  and a save at step 0, fail with an AssertionError;
- `_set_main_param_and_optimizer_states` wants a `step` from the checkpoint for each parameter, which the fully reshardable format keeps in
  the parameter groups instead: KeyError;
- `load_state_dict` hands one and the same `step` tensor to all parameters, so the next update counts as many steps as there are parameters.
Reason: a CPU run cannot resume otherwise. Only the fully reshardable format is served, the one that checkpoints here are written in.
Goes when: upstream loads such a checkpoint with torch's Adam.
"""

import functools
from typing import Any

import torch


def install() -> bool:
    """Wraps the three methods.

    Returns:
        True where they are wrapped, False where Adam comes from Transformer Engine or apex and they are right as they are.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return False
    optimizer_class = distrib_optimizer.DistributedOptimizer
    if hasattr(optimizer_class.state_dict, "__wrapped__"):
        return True
    optimizer_class.state_dict = _with_state(optimizer_class.state_dict)
    optimizer_class._set_main_param_and_optimizer_states = _keeping_step(optimizer_class._set_main_param_and_optimizer_states)
    optimizer_class.load_state_dict = _with_own_steps(optimizer_class.load_state_dict)
    return True


def _with_state(upstream: Any) -> Any:
    @functools.wraps(upstream)
    def state_dict(self: Any) -> dict[str, Any]:
        if isinstance(self.optimizer, torch.optim.Adam) and not self.optimizer.state:
            _start_adam(self.optimizer)
        return upstream(self)

    return state_dict


def _start_adam(optimizer: torch.optim.Adam) -> None:
    """Makes the state that Adam's first step would start from. Unlike a trial step this moves no weight and runs no hook."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
            }


def _keeping_step(upstream: Any) -> Any:
    @functools.wraps(upstream)
    def set_main_param_and_optimizer_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        # load_state_dict has set the true step from the parameter groups.
        upstream(self, model_param, {**tensors, "step": state["step"]} if "step" in state else tensors)

    return set_main_param_and_optimizer_states


def _with_own_steps(upstream: Any) -> Any:
    @functools.wraps(upstream)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        upstream(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    return load_state_dict
