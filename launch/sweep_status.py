"""How far the members of a sweep are, read from their folders."""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngpt.locks import holder
from ngpt.progress import HEARTBEATS, read_records
from ngpt.sweeps import SweptRun

from .ending import summary_of
from .failures import cause
from .many import DONE, FAILED, RUNNING, STOPPED, WAITING
from .outcome import SIGNALLED
from .run_folder import first_failure, outcome_of

METRICS_FILE = "metrics.jsonl"
TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Glance:
    """A member now. `val_loss`: the newest, in nats per token."""

    status: str
    step: int | None
    val_loss: float | None
    why: str


def glance(folder: Path, known: SweptRun) -> Glance:
    """Reads a member's folder, which knows more than the sweep's record: members are stopped and continued by themselves, too.

    Args:
        known: The record, for what the folder does not say.
    """
    outcome, failure = outcome_of(folder), first_failure(folder)
    status, why = known.status, known.why
    if holder(folder) is not None:
        status, why = RUNNING, ""
    elif outcome is not None:
        status, why = (STOPPED, "") if outcome.status == SIGNALLED else (DONE, "")
    elif failure is not None:
        status, why = FAILED, cause(folder, failure)
    elif known.status == RUNNING or (known.status == WAITING and read_records(folder / HEARTBEATS, "rank*.json")):
        status, why = FAILED, known.why or "ended without a word: its launcher was killed, or the machine went down"
    step, val_loss = figures(folder)
    return Glance(status, step, val_loss, why)


def figures(folder: Path) -> tuple[int | None, float | None]:
    """The newest step and validation loss of a run."""
    records = list(_tail(folder / METRICS_FILE))
    summary = summary_of(folder) or {}
    step = next((record["step"] for record in records if isinstance(record.get("step"), int)), None)
    losses = [record["val_loss"] for record in records if isinstance(record.get("val_loss"), float)]
    known = summary.get("val_loss") if summary.get("steps") == step or not losses else losses[0]
    return step, known if isinstance(known, float) else None


def _tail(path: Path) -> Iterable[dict[str, Any]]:
    """The last records of a file of JSON lines, the newest first."""
    lines: list[bytes] = []
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                yield record


def table(rows: Sequence[tuple[SweptRun, Glance]]) -> list[str]:
    """A line a member: status, step, validation loss, and why it failed."""
    shown = [("member", "status", "step", "val loss", "")]
    for member, now in rows:
        loss = "" if now.val_loss is None else f"{now.val_loss:.4f}"
        shown.append((member.name, now.status, "" if now.step is None else str(now.step), loss, now.why[:100]))
    widths = [max(len(row[column]) for row in shown) for column in range(4)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip() for row in shown]
