"""A rank's place: its operation, step and micro-batch, the heartbeat file that records them, and their wording. Needs no torch.

A rank marks each operation as it begins. A mark is a few assignments in memory. A thread (megatron_ext/training/watchdog.py) writes the
marks to `<run.dir>/heartbeat/rank<N>.json`, and ends a rank that has made none for too long.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ngpt.files import replacing

HEARTBEATS = "heartbeat"
FAILURE_FILE = "failure_rank{rank}.json"
HANG = "hang"  # the name of this kind of failure

# In the order of a step. A rank that is alive but at an earlier one than the others is the one they wait for.
STARTUP, LOAD, BEGIN, DATA, FORWARD, BACKWARD = "start-up", "load", "begin", "data", "forward", "backward"
GRADIENTS, OPTIMIZER, LOGGING, EVALUATION, SAVE, END = "gradients", "optimizer", "logging", "evaluation", "save", "end"
# Micro-batches repeat the three operations of a pass, so these share a place in the order.
_STAGE = {STARTUP: 0, LOAD: 1, BEGIN: 2, DATA: 3, FORWARD: 3, BACKWARD: 3}
_STAGE |= {GRADIENTS: 4, OPTIMIZER: 5, LOGGING: 6, EVALUATION: 7, SAVE: 8, END: 9}
_PASS = (DATA, FORWARD, BACKWARD)
_WORDS = {
    STARTUP: "the start-up",
    LOAD: "the load of the checkpoint",
    BEGIN: "the beginning",
    DATA: "reading the data",
    FORWARD: "forward",
    BACKWARD: "backward",
    GRADIENTS: "the gradient reduction",
    OPTIMIZER: "the optimizer",
    LOGGING: "the end",
    EVALUATION: "the evaluation after",
    SAVE: "the save",
    END: "the end of the run",
}


class Place(NamedTuple):
    """What a rank works on."""

    operation: str
    step: int  # 0 before the first
    microbatch: int  # from 1; 0 outside of passes. A stage of several model chunks counts each chunk's pass.
    marks: int  # marks so far: a rank whose count stands still makes no progress
    since: float  # time.monotonic() of the mark

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Sorts places of one run by how far a rank has come."""
        return order(self.operation, self.step, self.microbatch)


def order(operation: str, step: int, microbatch: int) -> tuple[int, int, int, int]:
    """Sorts operations of one run by how far a rank has come."""
    return step, _STAGE[operation], microbatch, _PASS.index(operation) if operation in _PASS else 0


def describe(operation: str, step: int, microbatch: int) -> str:
    """For instance `forward of step 6, micro-batch 2`."""
    words = _WORDS[operation]
    if operation in (STARTUP, LOAD, END):
        return words
    words += f"{'' if operation == EVALUATION else ' after' if operation == SAVE else ' of'} step {step}"
    return f"{words}, micro-batch {microbatch}" if microbatch else words


class Progress:
    """The place of this rank, kept as one tuple: a thread that reads it sees the old place or the new one."""

    def __init__(self) -> None:
        self.place = Place(STARTUP, 0, 0, 0, time.monotonic())
        self.steps = 0  # finished by this process
        self.step_time_s: float | None = None
        self._step_ended: float | None = None

    def mark(self, operation: str, step: int | None = None, microbatch: int = 0) -> None:
        """This rank begins `operation`.

        Args:
            step: None: the same as before.
        """
        before = self.place
        self.place = Place(operation, before.step if step is None else step, microbatch, before.marks + 1, time.monotonic())

    def begin_pass(self, operation: str, step: int) -> None:
        """The next micro-batch begins, with `operation`."""
        before = self.place
        follows = before.step == step and (before.operation in _PASS or before.operation == operation)
        self.mark(operation, step, before.microbatch + 1 if follows else 1)

    def end_step(self) -> None:
        """The step has updated the weights, or skipped the update."""
        self.mark(LOGGING)
        now = self.place.since
        if self._step_ended is not None:
            self.step_time_s = now - self._step_ended
        self._step_ended = now
        self.steps += 1


def write_json(path: Path, values: dict[str, Any], indent: int | None = None) -> None:
    """Replaces a file atomically: a reader sees the old content or the new one, even with several writers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, synced=False) as stream:
        stream.write((json.dumps(values, indent=indent) + "\n").encode())


def read_records(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """The objects in the JSON files that match; a file that is no object is left out."""
    records = []
    for path in sorted(folder.glob(pattern)):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_heartbeats(run_dir: Path) -> list[dict[str, Any]]:
    """The last heartbeats of a run's ranks, see `Watchdog`."""
    return read_records(run_dir / HEARTBEATS, "rank*.json")


def in_ranges(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0, 2-5`."""
    ranks = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [part for run in runs for part in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"
