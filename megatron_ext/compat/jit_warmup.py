"""Megatron's warm-up of compiled functions leaves the random numbers that weights are drawn from alone.

Upstream (megatron-core 0.19.2): `training/initialize.py: _warmup_jit_function` draws tensors of [sequence, micro-batch, hidden] from the
default generators after the seed was set and before the model is built.
Reason: weights drawn from the default generator (routers, Mamba's) would depend on the micro-batch size and the sequence length.
Goes when: upstream draws them elsewhere, or seeds afterwards.
"""

import functools

import torch

from megatron_ext.device import on_gpu


def install() -> bool:
    """Wraps the warm-up. Returns True: it is in force."""
    from megatron.training import initialize

    upstream = initialize._warmup_jit_function
    if getattr(upstream, "_keeps_generators", False):
        return True

    @functools.wraps(upstream)
    def warm_up(*args, **kwargs) -> None:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu() else []):
            upstream(*args, **kwargs)

    warm_up._keeps_generators = True
    initialize._warmup_jit_function = warm_up
    return True
