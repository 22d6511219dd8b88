"""The job of a run folder: the newest that was submitted for it, and whether it waits or runs."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ngpt.files import replacing
from ngpt.shell import in_shell

from . import scheduler

JOB_FILE = "job.json"


def record_job(run_dir: Path, job: str, command: Sequence[str]) -> None:
    """Records the id of the run's newest job, which may be a task of an array (`42_3`)."""
    entry = {"job": job, "submitted": datetime.now(UTC).isoformat(timespec="seconds"), "command": in_shell(*command)}
    with replacing(run_dir / JOB_FILE) as stream:
        stream.write(f"{json.dumps(entry, indent=2)}\n".encode())


def last_job(run_dir: Path) -> str | None:
    """The id of the last job that `ngpt launch` submitted for a run folder; None if there is none."""
    try:
        return json.loads((run_dir / JOB_FILE).read_text(encoding="utf-8"))["job"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def queued(folders: Sequence[Path]) -> dict[Path, str]:
    """Run folder -> running | pending, for those that SLURM has a job for.

    Raises:
        ConfigError: SLURM does not answer.
    """
    jobs = {folder: job for folder in folders if (job := last_job(folder)) is not None}
    states: dict[str, str | None] = {}
    for array in sorted({job.partition("_")[0] for job in jobs.values()}):
        states |= {task["job"]: scheduler.standing([task]) for task in scheduler.queue(array, each_task=True)}
    return {folder: state for folder, job in jobs.items() if (state := states.get(job)) is not None}
