"""The writer of checkpoint shards hashes what it writes, checks what it is given, and says what went wrong.

Upstream (megatron-core 0.19.2), `core/dist_checkpointing/strategies/filesystem_async.py: FileSystemWriterAsync`, which writes synchronous
saves in the trainer and asynchronous ones in a process of their own:
- hashes shards only in a second pass over all files by rank 0 (`verify_integrity`);
- flushes a file to the disk before Python has handed it the last bytes (`os.fsync` of a buffered stream);
- loses the errno of a failed write on its way (`AssertionError: <class 'OSError'>`), and rank 0's own failures leave the others waiting.
Here the writer's `open` gives a file that is hashed by a thread beside it, a second thread checks the tensors meanwhile, some blocks are
read back once they are flushed, and the outcome travels as one more write result to rank 0 (`FileSystemWriterAsync.finish`), which keeps
it for whoever publishes the checkpoint (`take_outcome`). Failures are outcomes, too: all ranks come to the end of the save.
Reason: a checkpoint proves what it is for a few percent of the time of its save, and a refused write is told by its cause.
Goes when: upstream hashes in flight and reports errors by rank.
"""

import errno
import functools
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import WriteResult
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_ext.optim.saved_tensors import TensorRules, first_fault
from ngpt.checkpoints.hashing import FileRecord, HashingFile

READ_BACK_BLOCKS = 256  # of 256 KiB for all files of a rank: 64 MiB
_SPARE_PART = 0.02  # of the tensors' bytes: headers, indices, config, manifest


@dataclass(frozen=True)
class Problem:
    """Why a checkpoint cannot be published.

    Attributes:
        path: What could not be written; the shard, where its content is at fault.
        what: The reason, in words.
        errno: Of a refused write; 0 where the content is at fault.
    """

    path: str
    what: str
    errno: int = 0

    @classmethod
    def of(cls, error: Exception, path: str) -> "Problem":
        if isinstance(error, OSError):
            return cls(str(error.filename or path), error.strerror or str(error), error.errno or errno.EIO)
        return cls(path, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class ShardResult(WriteResult):
    """The outcome of writing one file, among the write results of its tensors."""

    path: str = ""
    record: FileRecord | None = None
    problem: Problem | None = None


@dataclass
class Outcome:
    """What rank 0 knows of a save once all ranks have written: the hashed files by name, or the first problem."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    problem: Problem | None = None


class NotEnoughSpace(Exception):
    """Raised on every rank before anything is written."""

    def __init__(self, folder: str, needed: int, free: int) -> None:
        super().__init__(folder, needed, free)
        self.folder, self.needed, self.free = folder, needed, free


rules = TensorRules()  # what the tensors of the coming save must obey; set in the trainer, and sent to the process that writes
_asynchronous: set[str] = set()  # folders of saves during which training goes on
_expected: set[str] = set()  # folders whose outcome is asked for
_outcomes: dict[str, Outcome] = {}  # by folder, on rank 0
_open: dict[str, HashingFile] = {}  # by path, in the process that writes
_sample_limit = READ_BACK_BLOCKS


def install() -> bool:
    """Wraps the writer. Runs in the trainer and in the process that writes asynchronous saves."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    if hasattr(writer.finish, "__wrapped__"):
        return True
    filesystem_async.open = _open_hashed  # write_preloaded_data alone opens files there
    writer.write_preloaded_data = staticmethod(_checked(writer.write_preloaded_data))
    writer.prepare_write_data = _with_room(writer.prepare_write_data)
    writer.get_save_function_and_args = _with_rules(writer.get_save_function_and_args)
    writer.finish = _keeping_outcome(writer.finish)
    serialization.save_config = _unless_failed(serialization.save_config)
    return True


def expect_outcome(folder: str | Path, asynchronous: bool = False) -> None:
    """Says on every rank, before a save into `folder`, that `take_outcome` will be asked: its failures become outcomes.

    Args:
        asynchronous: Training goes on while it is written.
    """
    _expected.add(str(folder))
    if asynchronous:
        _asynchronous.add(str(folder))


def take_outcome(folder: str | Path) -> Outcome:
    """The outcome of a save into `folder` after all ranks have written. Rank 0 alone knows it."""
    return _outcomes.pop(str(folder), Outcome(problem=Problem(str(folder), "the save did not come to its end")))


def forget_outcome(folder: str | Path) -> None:
    """Says on every rank that the save into `folder` is over."""
    _expected.discard(str(folder))
    _asynchronous.discard(str(folder))
    _outcomes.pop(str(folder), None)


def _open_hashed(path: str, mode: str) -> HashingFile:
    assert mode == "wb", f"upstream opens {path} as {mode}"
    _open[path] = HashingFile(path, _sample_limit)
    return _open[path]


def _checked(upstream: Callable) -> Callable:
    """Around the function that writes one file."""

    @functools.wraps(upstream)
    def write_preloaded_data(transform_list, local_proc_idx, write_bucket, results_queue, count_queue, use_fsync, **kwargs) -> Any:
        path, _, (_, tensors) = write_bucket
        with ThreadPoolExecutor(1) as beside:
            fault = beside.submit(first_fault, tensors, rules)
            index, results = upstream(transform_list, local_proc_idx, write_bucket, None, None, use_fsync, **kwargs)
            shard = _shard_result(path, results, fault.result)
        output = index, [shard] if shard.problem else [*results, shard]
        if results_queue is not None:
            results_queue.put(output)
        if count_queue is not None:
            count_queue.get()
            count_queue.task_done()
        return output

    return write_preloaded_data


def _shard_result(path: str, results: list | Exception, fault: Callable[[], str | None]) -> ShardResult:
    file, record, problem = _open.pop(path, None), None, None
    if isinstance(results, Exception):
        problem = Problem.of(file.error if file is not None and file.error is not None else results, path)
    else:
        try:
            record, what = file.record, fault()
            offset = file.samples.first_difference(file.path) if what is None else None
            if offset is not None:
                what = f"the disk gives back other bytes than were written, at {offset:,} of {record.size:,}"
            problem = Problem(path, what) if what else None
        except Exception as error:  # no exception may leave this thread: upstream waits for its answer
            problem = Problem.of(error, path)
    return ShardResult(MetadataIndex(""), 0, None, path=path, record=record, problem=problem)


def _with_rules(upstream: Callable) -> Callable:
    """The rules travel with the tensors, since another process may write them."""

    @functools.wraps(upstream)
    def get_save_function_and_args(self: Any) -> tuple:
        write, preload, arguments = upstream(self)
        return write and functools.partial(_write_by_rules, rules, write), preload, arguments

    return get_save_function_and_args


def _write_by_rules(given: TensorRules, write: Callable, rank: int, buckets: list, queue: Any) -> None:
    global rules, _sample_limit
    install()  # in a process of its own nobody else may have
    rules, _sample_limit = given, max(READ_BACK_BLOCKS // len(buckets), 1)
    write(rank, buckets, queue)


def _with_room(upstream: Callable) -> Callable:
    """Asks for the space that all ranks together need, before the first byte.

    Parallelism: all ranks call it together; one all-reduce of two numbers.
    """

    @functools.wraps(upstream)
    def prepare_write_data(self: Any, plan: Any, planner: Any) -> None:
        upstream(self, plan, planner)
        if str(self.checkpoint_dir) in _asynchronous:  # upstream would hand the worker the memory that training goes on in
            self.write_buckets = [
                (path, key, (objects, [(item, tensor.clone() if tensor.is_cpu else tensor) for item, tensor in tensors]))
                for path, key, (objects, tensors) in self.write_buckets
            ]
        needed = 0
        for _, _, (objects, tensors) in self.write_buckets:
            needed += sum(len(data.getbuffer()) for _, data in objects) + sum(tensor.nbytes for _, tensor in tensors)
        free = _free_bytes(self.checkpoint_dir)
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        total = torch.tensor([needed], dtype=torch.int64, device=device)
        least = torch.tensor([free], dtype=torch.int64, device=device)
        dist.all_reduce(total)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        needed, free = int(total.item() * (1 + _SPARE_PART)), least.item()
        if str(self.checkpoint_dir) in _expected and needed > free:
            raise NotEnoughSpace(str(self.checkpoint_dir), needed, free)

    return prepare_write_data


def _free_bytes(folder: str | Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:  # the folder is not visible on this rank's machine yet
        return 2**62


def _keeping_outcome(upstream: Callable) -> Callable:
    """Rank 0 writes torch's index of the shards here, unless a shard failed."""

    @functools.wraps(upstream)
    def finish(self: Any, metadata: Any, results: list[list[WriteResult]]) -> None:
        shards = [result for of_rank in results for result in of_rank if isinstance(result, ShardResult)]
        outcome = Outcome({Path(shard.path).name: shard.record for shard in shards if shard.problem is None})
        outcome.problem = next((shard.problem for shard in shards if shard.problem is not None), None)
        if str(self.checkpoint_dir) in _expected:
            _outcomes[str(self.checkpoint_dir)] = outcome
        elif outcome.problem is not None:
            raise OSError(outcome.problem.errno or errno.EIO, outcome.problem.what, outcome.problem.path)
        if outcome.problem is None:
            own = [[result for result in of_rank if not isinstance(result, ShardResult)] for of_rank in results]
            try:
                upstream(self, metadata, own)
            except OSError as error:
                if str(self.checkpoint_dir) not in _expected:
                    raise
                outcome.problem = Problem.of(error, os.path.join(self.checkpoint_dir, ".metadata"))

    return finish


def _unless_failed(upstream: Callable) -> Callable:
    """Rank 0 writes Megatron's word for the format here, and the other ranks wait for it."""

    @functools.wraps(upstream)
    def save_config(config: Any, folder: str | Path) -> None:
        outcome = _outcomes.get(str(folder))
        if outcome is None:
            upstream(config, folder)
        elif outcome.problem is None:
            try:
                upstream(config, folder)
            except OSError as error:
                outcome.problem = Problem.of(error, os.path.join(folder, "metadata.json"))

    return save_config


def set_rules(unit_dims: Mapping[str, int], tolerance: float) -> None:
    """What the tensors of the coming save must obey.

    Args:
        unit_dims: Name of a master in the checkpoint -> dimension of its matrix along which its vectors have norm 1.
        tolerance: The largest | norm - 1 |.
    """
    global rules
    rules = TensorRules(dict(unit_dims), tolerance)
