"""How far the members of a sweep have come, read from their folders."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.files import last_lines
from ngpt.locks import holder
from ngpt.progress import HEARTBEATS, read_records
from ngpt.shell import in_shell
from ngpt.sweeps import SWEEP_FILE, Sweep, SweptRun, read_sweep

from .ending import summary_of
from .failures import cause
from .many import DONE, FAILED, RUNNING, STOPPED, WAITING
from .outcome import SIGNALLED, damage
from .run_folder import METRICS_FILE, first_failure, outcome_of
from .slurm.after import LOG_FILE
from .slurm.jobs import last_job, queued

PENDING = "pending"


@dataclass(frozen=True)
class Glance:
    """The current state of a member. `val_loss`: the newest, in nats per token."""

    status: str
    step: int | None
    val_loss: float | None
    why: str


def glance(folder: Path, known: SweptRun, launcher: bool) -> Glance:
    """Reads a member's folder. It is more current than the sweep's record, since members can be stopped and continued individually.

    Args:
        known: The record, for what the folder does not show.
        launcher: Whether the process that keeps the record is still running.
    """
    outcome, failure = outcome_of(folder), first_failure(folder)
    status, why = known.status, known.why
    if holder(folder) is not None or (launcher and known.status == RUNNING):
        status, why = RUNNING, ""
    elif outcome is not None:
        status, why = (STOPPED, "") if outcome.status == SIGNALLED else (DONE, "")
    elif failure is not None:
        status, why = FAILED, cause(folder, failure)
    elif known.status == RUNNING or (known.status == WAITING and read_records(folder / HEARTBEATS, "rank*.json")):
        ended = damage(folder) or "ended without a word: its launcher was killed, or the machine went down"
        status, why = FAILED, known.why or ended
    elif known.status == WAITING and (said := last_lines(folder / LOG_FILE)):  # a job that ended before its ranks could say why
        status, why = FAILED, said[-1]
    step, val_loss = figures(folder)
    return Glance(status, step, val_loss, why)


def figures(folder: Path) -> tuple[int | None, float | None]:
    """The newest step and validation loss of a run."""
    records = list(newest_records(folder / METRICS_FILE))
    summary = summary_of(folder) or {}
    step = next((record["step"] for record in records if isinstance(record.get("step"), int)), None)
    losses = [record["val_loss"] for record in records if isinstance(record.get("val_loss"), float)]
    known = summary.get("val_loss") if summary.get("steps") == step or not losses else losses[0]
    return step, known if isinstance(known, float) else None


def newest_records(path: Path) -> Iterable[dict[str, Any]]:
    """The last records of a file of JSON lines, the newest first."""
    for line in reversed(last_lines(path)):
        with suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                yield record


def sweep_of(folder: Path) -> Sweep:
    """The record of a sweep.

    Raises:
        ConfigError: it cannot be read.
    """
    sweep = read_sweep(folder)
    if sweep is None:
        way_out = "Restore it, or look at its members one by one"
        raise ConfigError(str(folder / SWEEP_FILE), "Cannot be read", "It says what the sweep is", way_out)
    return sweep


def sweep_status(folder: Path) -> dict[str, Any]:
    """Everything that is known about a sweep, as one JSON object."""
    sweep, problem, jobs = sweep_of(folder), None, dict[Path, str]()
    try:
        jobs = queued([folder / member.name for member in sweep.members])
    except ConfigError as error:
        problem = str(error)
    members, runner = [], holder(folder)
    for member in sweep.members:
        now = glance(folder / member.name, member, runner is not None)
        if job := jobs.get(folder / member.name):
            now = replace(now, status=job, why="")
        members.append({"name": member.name, "values": member.values, "job": last_job(folder / member.name), **asdict(now)})
    return {
        "sweep": str(folder),
        "swept": sweep.swept,
        "counts": dict(Counter(member["status"] for member in members)),
        "members": members,
        "launcher": runner,
        "problem": problem,
        "command": sweep.command,
    }


def print_sweep_status(folder: Path, as_json: bool) -> None:
    """Prints how far a sweep has come, as one JSON object or as a table."""
    found = sweep_status(folder)
    print(json.dumps(found, indent=1) if as_json else "\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    counts = ", ".join(f"{count} {status}" for status, count in found["counts"].items())
    yield f"{found['sweep']}: sweep over {' x '.join(found['swept'])}, {len(found['members'])} members: {counts}"
    if found["launcher"]:
        yield f"launcher  process {found['launcher']['pid']} on {found['launcher']['host']}"
    if found["problem"]:
        yield found["problem"]
    names = [entry.name for entry in fields(Glance)]
    yield from table([(member["name"], Glance(**{name: member[name] for name in names})) for member in found["members"]])
    folder = in_shell(found["sweep"])
    if found["launcher"] or {RUNNING, PENDING} & set(found["counts"]):
        yield f"next      ngpt stop {folder}"
    elif set(found["counts"]) == {DONE}:
        yield f"next      ngpt report {folder}"
    else:
        yield f"next      {found['command']}"


def table(rows: Sequence[tuple[str, Glance]]) -> list[str]:
    """One line per member: status, step, validation loss, and why it failed."""
    shown = [("member", "status", "step", "val loss", "")]
    for name, now in rows:
        loss = "" if now.val_loss is None else f"{now.val_loss:.4f}"
        shown.append((name, now.status, "" if now.step is None else str(now.step), loss, now.why))
    return in_columns(shown)


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of as many cells each, as lines; the last column may be ragged."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]
