"""The process that writes asynchronous checkpoints: it runs without CUDA, survives the signals of its job, and ends with the trainer; the
trainer notices its death.

Upstream (megatron-core 0.19.2): `core/dist_checkpointing/strategies/async_utils.py: PersistentAsyncCaller` starts one process through a
fork server and talks to it over three queues;
- `async_loop`, which runs there, starts with `torch.cuda.set_device(rank % torch.cuda.device_count())`. Without CUDA that is a division
  by zero;
- it waits for requests on a queue whose two ends it holds itself, and it holds open the pipe whose end the fork server waits for: a killed
  trainer leaves both processes behind, with their memory, their device and the trainer's output open;
- SIGTERM and the like end it, and with it the save that a signal sent to every process of a job has triggered;
- `is_current_async_call_done`, `schedule_async_call` and `close` wait for it without looking whether it lives: the run hangs.
Reason: a CPU run can save asynchronously, a signal or a killed run leaves nothing behind and loses no save, and a run without its writer
ends with an error. The process is the trainer's own child, so the kernel ends it with the trainer (through a fork server it would not).
Goes when: upstream's worker ends with its trainer, ignores the signals, and is watched; on a CPU, when `cuda_on_cpu` goes.
"""

import atexit
import multiprocessing
import queue
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from megatron_ext.compat import cuda_on_cpu, results_queue
from ngpt.config.checkpoints import TRACKER_FILE
from ngpt.lifetime import end_with_parent
from ngpt.stopping import STOP_SIGNALS

_POLL_S = 0.005
_REAPING_S = 10.0


class CheckpointWriterDied(RuntimeError):
    """The process that writes this rank's asynchronous checkpoints has ended by itself."""


def install() -> bool:
    """Makes persistent checkpoint workers of this process start in `run_worker`, and watches them."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, PersistentAsyncCaller

    if PersistentAsyncCaller.async_loop is run_worker:
        return True
    run_worker.upstream = PersistentAsyncCaller.async_loop
    PersistentAsyncCaller.async_loop = staticmethod(run_worker)  # found by name in the new process
    PersistentAsyncCaller._get_process = classmethod(_starts_watched(PersistentAsyncCaller._get_process.__func__))
    PersistentAsyncCaller.close = _closes_dead(PersistentAsyncCaller.close)
    AsyncCallsQueue.maybe_finalize_async_calls = _checks_after(AsyncCallsQueue.maybe_finalize_async_calls, PersistentAsyncCaller)
    return True


def run_worker(rank: int, requests: Any, staged: Any, completed: Any, *args: Any) -> None:
    """Upstream's loop of the checkpoint worker. Runs in a fresh process."""
    end_with_parent(multiprocessing.parent_process().pid)
    results_queue.report_through(completed)
    cuda_on_cpu.install()
    install()  # finds upstream's loop, whether or not the entry point was imported and patched here
    run_worker.upstream(rank, requests, staged, completed, *args)


def _starts_watched(upstream: Callable[..., Any]) -> Callable[..., Any]:
    def get_process(cls: Any, rank: int, mp_mode: str = "spawn", *args: Any, **kwargs: Any) -> Any:
        if cls._persistent_process is not None:
            return cls._persistent_process
        with _survived_signals_blocked():
            process = upstream(cls, rank, "spawn", *args, **kwargs)
        # When the trainer leaves with an error, multiprocessing would send SIGTERM, which this process ignores, and wait.
        atexit.register(process.kill)
        watch = _Watch(process, rank)
        cls._persistent_queue = _Requests(cls._persistent_queue, watch)
        cls._persistent_preload_q = _Requests(cls._persistent_preload_q, watch)
        cls._persistent_comp_q = _Completed(cls._persistent_comp_q, watch)
        return process

    return get_process


@contextmanager
def _survived_signals_blocked() -> Iterator[None]:
    """A process started in here never sees the signals; those that reach this one meanwhile are handled at the end."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # multiprocessing starts it with the first queue, and unblocks signals then
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _checks_after(upstream: Callable[..., Any], caller: Any) -> Callable[..., Any]:
    def maybe_finalize_async_calls(self: Any, blocking: bool = False, no_dist: bool = False) -> list[int]:
        finalised = upstream(self, blocking, no_dist)  # first, because what was written before the death counts
        if caller._persistent_process is not None:
            caller._persistent_queue.watch.check()
        return finalised

    return maybe_finalize_async_calls


def _closes_dead(upstream: Callable[..., Any]) -> Callable[..., Any]:
    def close(self: Any, abort: bool = False) -> None:
        dead = self.process is not None and not self.process.is_alive()
        upstream(self, abort or dead)  # aborting waits for nothing

    return close


class _Watch:
    """Whether the worker of this rank lives."""

    def __init__(self, process: Any, rank: int) -> None:
        self.process, self.rank = process, rank

    def check(self) -> None:
        """Raises CheckpointWriterDied where the worker has ended."""
        if not self.process.is_alive():
            raise self.death()

    def death(self) -> CheckpointWriterDied:
        """The error that tells how the worker ended, and from what the run can continue."""
        self.process.join(_REAPING_S)  # its pipes close a moment before its exit code is known
        code = self.process.exitcode
        how = f"signal {-code}, {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return CheckpointWriterDied(f"checkpoint writer of rank {self.rank} died ({how}); {_newest_checkpoint()}")


def _newest_checkpoint() -> str:
    from megatron.training import get_args

    tracker = Path(get_args().save) / TRACKER_FILE
    return f"the newest checkpoint is that of step {tracker.read_text().strip()}" if tracker.is_file() else "there is no checkpoint yet"


class _Requests:
    """The trainer's end of a JoinableQueue to the worker: `join` ends when the worker does."""

    def __init__(self, requests: Any, watch: _Watch) -> None:
        self._requests, self.watch = requests, watch
        requests.cancel_join_thread()  # what a dead worker does not fetch must not keep the trainer from leaving

    def put(self, item: Any) -> None:
        self._requests.put(item)

    def join(self) -> None:
        # Not JoinableQueue.join: it waits for a lock that a killed worker may have left locked.
        while not self._requests._unfinished_tasks._semlock._is_zero():
            self.watch.check()
            time.sleep(_POLL_S)


class _Completed:
    """The trainer's end of the queue that the worker answers on: results of writing go to the trainer's own queue, indices to upstream."""

    def __init__(self, completed: Any, watch: _Watch) -> None:
        self._completed, self._watch = completed, watch
        completed._writer.close()  # the worker's copy is now the only one: an answer cut short by its death is an end of file

    def get_nowait(self) -> int:
        """Index of the request that was completed next.

        Raises:
            queue.Empty: there is none yet.
            CheckpointWriterDied: there will be none.
        """
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        while True:
            alive = self._watch.process.is_alive()  # asked first, so that the last answers of a worker that ends now are still read
            try:
                item = self._completed.get_nowait()
            except queue.Empty:
                if alive:
                    raise
                raise self._watch.death() from None
            except (EOFError, OSError):
                raise self._watch.death() from None
            if isinstance(item, int):
                return item
            filesystem_async._results_queue.put(item)
