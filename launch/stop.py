"""`ngpt stop RUN`: has a run save and leave, and not come back."""

import os
import shlex
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

from ngpt.config.errors import ConfigError

from .slurm import scheduler
from .slurm.after import STOP_FILE
from .status import holder
from .submit import last_job


def stop(run_dir: Path) -> str:
    """Asks whoever trains in the folder to save and leave; what was done.

    Raises:
        ConfigError: it runs where it cannot be reached from here.
    """
    job = last_job(run_dir)
    if job is not None and (tasks := scheduler.queue(job)):
        return _stop_job(run_dir, job, [task["state"] for task in tasks])
    launcher = holder(run_dir)
    if launcher is None:
        return f"{run_dir} does not run"
    if launcher["host"] != socket.gethostname() or launcher["pid"] is None:
        way_out = f"Call ngpt stop {shlex.quote(str(run_dir))} there"
        raise ConfigError("run.dir", str(run_dir), f"Is being trained by process {launcher['pid']} on {launcher['host']}", way_out)
    try:
        os.kill(launcher["pid"], signal.SIGTERM)
    except ProcessLookupError:
        return f"{run_dir} is leaving already: its launcher has gone"
    return f"asked process {launcher['pid']} to save and leave; ngpt status {shlex.quote(str(run_dir))} says when it has"


def _stop_job(run_dir: Path, job: str, states: Sequence[str]) -> str:
    """The file comes first: the job's script reads it once the tasks have left."""
    (run_dir / STOP_FILE).touch()
    waits = set(states) == {"PENDING"}  # and has nothing to save
    complaint = scheduler.cancel(job) if waits else scheduler.signal_tasks(job)
    if complaint is not None:
        raise ConfigError("run.dir", str(run_dir), f"SLURM does not pass it on to job {job}: {complaint}", f"scancel {job} ends it at once")
    if waits:
        return f"job {job} was waiting and is cancelled"
    return f"asked job {job} to save and leave, not to come back; ngpt status {shlex.quote(str(run_dir))} says when it has"
