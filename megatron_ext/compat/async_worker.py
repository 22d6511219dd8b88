"""Asynchronous checkpoints on a CPU: the process that writes them needs `cuda_on_cpu` too.

Upstream (megatron-core 0.19.2): `core/dist_checkpointing/strategies/async_utils.py: PersistentAsyncCaller.async_loop` runs in a fresh
process and starts with `torch.cuda.set_device(rank % torch.cuda.device_count())`. Without CUDA that is a division by zero: the process
ends, and the trainer waits for it for ever.
Reason: a CPU run can save asynchronously. The replacement is found by name in the new process, installs `cuda_on_cpu` and goes on upstream.
Goes when: `cuda_on_cpu` goes.
"""

from typing import Any

from megatron_ext.compat import cuda_on_cpu


def install() -> bool:
    """Makes persistent checkpoint workers of this process start in `run_worker`."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop = staticmethod(run_worker)
    return True


def run_worker(*args: Any, **kwargs: Any) -> None:
    """Upstream's loop of the checkpoint worker on a CPU. Runs in a fresh process, where upstream's method is in its place."""
    cuda_on_cpu.install()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args, **kwargs)
