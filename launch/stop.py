"""`ngpt stop RUN`: makes a run, or all runs of a sweep, save, leave and not restart."""

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.shell import in_shell

from .slurm import scheduler
from .slurm.after import STOP_FILE
from .slurm.jobs import last_job, queued
from .status import holder
from .sweep_status import sweep_of


def stop(run_dir: Path) -> str:
    """Asks whatever trains in the folder to save and leave. Returns a line on what was done.

    Raises:
        ConfigError: the run cannot be reached from here.
    """
    job = last_job(run_dir)
    if job is not None and (tasks := scheduler.queue(job)):
        return _stop_job(run_dir, job, [task["state"] for task in tasks])
    launcher = holder(run_dir)
    return f"{run_dir} does not run" if launcher is None else _ask(run_dir, launcher)


def stop_sweep(folder: Path) -> str:
    """Asks a sweep's running members to save and leave, and waiting ones not to start. Returns what was done, one line each.

    Raises:
        ConfigError: a running member cannot be reached from here.
    """
    if (launcher := holder(folder)) is not None:  # the launcher passes it on to all members
        return _ask(folder, launcher)
    folders = [folder / member.name for member in sweep_of(folder).members]
    jobs = queued(folders)
    asked = [stop(member) for member in folders if member in jobs or holder(member) is not None]
    return "\n".join(asked) or f"no member of {folder} runs"


def _ask(run_dir: Path, launcher: Mapping[str, Any]) -> str:
    if launcher["host"] != socket.gethostname() or launcher["pid"] is None:
        way_out = f"Call ngpt stop {in_shell(str(run_dir))} there"
        raise ConfigError("run.dir", str(run_dir), f"Is being trained by process {launcher['pid']} on {launcher['host']}", way_out)
    try:
        os.kill(launcher["pid"], signal.SIGTERM)
    except ProcessLookupError:
        return f"{run_dir} is leaving already: its launcher has gone"
    return f"asked process {launcher['pid']} to save and leave; ngpt status {in_shell(str(run_dir))} says when it has"


def _stop_job(run_dir: Path, job: str, states: Sequence[str]) -> str:
    """Stops a job. The file is written first, since the job's script reads it once the tasks have left."""
    (run_dir / STOP_FILE).touch()
    waits = set(states) == {"PENDING"}  # a pending job has nothing to save
    complaint = scheduler.cancel(job) if waits else scheduler.signal_tasks(job)
    if complaint is not None:
        raise ConfigError("run.dir", str(run_dir), f"SLURM does not pass it on to job {job}: {complaint}", f"scancel {job} ends it at once")
    if waits:
        return f"job {job} was waiting and is cancelled"
    return f"asked job {job} to save and leave, not to come back; ngpt status {in_shell(str(run_dir))} says when it has"
