"""What the writer of a checkpoint reports comes back on a queue inside the trainer: a save starts no process.

Upstream (megatron-core 0.19.2): `core/dist_checkpointing/strategies/filesystem_async.py: get_write_results_queue` makes the queue for the
results of writing in a `multiprocessing.Manager`, a process that imports torch and Megatron (660 MB), holds the trainer's stdout open,
stays for ever when the trainer is killed, and dies of a SIGTERM sent to every process of a job, which loses the save. A synchronous save
writes with threads of the trainer alone, so nothing else needs the process.
Reason: a save that a signal has triggered is finished, and nothing outlives a trainer.
Goes when: upstream's queue needs no process of its own.

The queue is upstream's `_results_queue`, set before upstream looks for it. An asynchronous save sends it, pickled inside a request, to the
process that writes (`async_worker`): there it becomes the queue that the process was started with. A writer that is forked for one save
(Megatron without `--use-persistent-ckpt-worker`) would put its results into a copy; this project never asks for one.
"""

import queue
from typing import Any

_of_this_process: Any = None


class ResultsQueue(queue.Queue):
    """Results of writing, for the trainer; in the process that writes asynchronously it is the queue back to the trainer."""

    def __reduce__(self) -> tuple[Any, ...]:
        return queue_of_this_process, ()


def install() -> bool:
    """Makes saves of this process report through a queue inside it."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not isinstance(filesystem_async._results_queue, ResultsQueue):
        filesystem_async._results_queue = ResultsQueue()
    return True


def report_through(channel: Any) -> None:
    """In the process that writes: results go into `channel`, which has a `put`."""
    global _of_this_process
    _of_this_process = channel


def queue_of_this_process() -> Any:
    """What a pickled `ResultsQueue` becomes here."""
    assert _of_this_process is not None, "only a checkpoint worker unpickles a results queue"
    return _of_this_process
