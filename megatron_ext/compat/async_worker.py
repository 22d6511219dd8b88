"""The process that writes asynchronous checkpoints: it runs without CUDA, and it ends with the trainer.

Upstream (megatron-core 0.19.2): `core/dist_checkpointing/strategies/async_utils.py: PersistentAsyncCaller.async_loop`, run in a fresh
process that belongs to a fork server,
- starts with `torch.cuda.set_device(rank % torch.cuda.device_count())`. Without CUDA that is a division by zero: the process ends, and the
  trainer waits for it for ever;
- waits for requests on a queue whose two ends it holds itself: a trainer that is killed leaves it behind, with its memory, its device and
  the trainer's output open.
Reason: a CPU run can save asynchronously, and a killed run leaves nothing behind. The replacement is found by name in the new process.
Goes when: upstream's worker ends with its trainer; on a CPU, when `cuda_on_cpu` goes.
"""

import multiprocessing
import os
import threading
from typing import Any

from megatron_ext.compat import cuda_on_cpu


def install() -> bool:
    """Makes persistent checkpoint workers of this process start in `run_worker`."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    if PersistentAsyncCaller.async_loop is not run_worker:
        run_worker.upstream = PersistentAsyncCaller.async_loop
        PersistentAsyncCaller.async_loop = staticmethod(run_worker)
    return True


def run_worker(*args: Any, **kwargs: Any) -> None:
    """Upstream's loop of the checkpoint worker. Runs in a fresh process."""
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    cuda_on_cpu.install()
    install()  # finds upstream's loop, whether or not the entry point has been imported, and patched, here
    run_worker.upstream(*args, **kwargs)


def _end_with_trainer() -> None:
    # A checkpoint whose trainer is gone is never finalised, so there is nothing to finish.
    multiprocessing.parent_process().join()
    os._exit(1)
