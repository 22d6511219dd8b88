"""SLURM's commands: submit, look, requeue, signal, cancel."""

import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ngpt.config.errors import ConfigError

SECONDS = 60  # that a busy controller may take to answer
PAUSES = (2, 5, 10, 0)  # seconds after each time that it does not
AWAY = (
    "does not answer",
    "Unable to contact slurm controller",
    "Socket timed out",
    "Connection refused",
    "Zero Bytes were transmitted",
    "Unexpected message received",  # all that `scontrol requeue` of SLURM 22.05 says where there is no controller
)


@dataclass(frozen=True)
class JobState:
    """What `scontrol show job` tells of one job, or one task of an array."""

    state: str  # PENDING | RUNNING | COMPLETING | ...
    reason: str
    restarts: int
    preempted: bool


def submit(script: Path, environment: Mapping[str, str]) -> str:
    """Submits a script; the job's id.

    Raises:
        ConfigError: SLURM refuses it, or is not there.
    """
    done = _run(["sbatch", "--parsable", str(script)], environment)
    if done.returncode != 0:
        raise ConfigError("sbatch", done.stderr.strip() or "no answer", "SLURM refuses the job", f"Correct cluster.*; script: {script}")
    return done.stdout.strip().partition(";")[0]  # ";cluster" follows where there are several


def job_state(job: str) -> JobState | None:
    """None where SLURM does not know the job, or does not answer."""
    done = _insist(["scontrol", "--oneliner", "show", "job", job])
    if done.returncode != 0 or not done.stdout.strip():
        return None
    fields = dict(word.split("=", 1) for word in done.stdout.splitlines()[0].split() if "=" in word)
    restarts = fields.get("Restarts", "0")
    return JobState(
        state=fields.get("JobState", ""),
        reason=fields.get("Reason", "None"),
        restarts=int(restarts) if restarts.isdigit() else 0,
        preempted=fields.get("PreemptTime", "None") not in ("None", "N/A", "Unknown"),
    )


def queue(job: str, each_task: bool = False) -> list[dict[str, str]]:
    """What of a job waits or runs, one dict each; empty where there is nothing.

    Args:
        each_task: Of an array, each task by itself; else those that wait are one entry.

    Raises:
        ConfigError: SLURM does not answer: nobody knows whether the job runs.
    """
    names = {"job": "%i", "state": "%T", "reason": "%r", "elapsed": "%M", "left": "%L", "nodes": "%N", "start": "%S"}
    done = _run(["squeue", "--noheader", "--jobs", job, "--format", "|".join(names.values()), *(["--array"] if each_task else [])])
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:
            return []
        said = " ".join(done.stderr.split()) or f"squeue ended with {done.returncode}"
        raise ConfigError("SLURM", said, f"It must say whether job {job} waits or runs", "Try again where and when SLURM answers")
    return [dict(zip(names, line.split("|"), strict=False)) for line in done.stdout.splitlines() if line.strip()]


def requeue(job: str) -> str | None:
    """Has a running job end and wait to start again. None, or why SLURM refuses. This ends the caller where it is part of the job."""
    return _complaint(_insist(["scontrol", "requeue", job]))


def signal_tasks(job: str) -> str | None:
    """SIGTERM to the tasks of a job's steps, not to its script. None, or why SLURM refuses."""
    return _complaint(_run(["scancel", "--signal=TERM", job]))


def cancel(job: str) -> str | None:
    """Takes a waiting job out of the queue. None, or why SLURM refuses."""
    return _complaint(_run(["scancel", job]))


def _complaint(done: subprocess.CompletedProcess) -> str | None:
    return None if done.returncode == 0 else " ".join(done.stderr.split()) or f"exit code {done.returncode}"


def _insist(command: list[str]) -> subprocess.CompletedProcess:
    """Asks again where the controller is away for a moment: a job that is not asked to come back does not."""
    for pause in PAUSES:
        done = _run(command)
        if done.returncode == 0 or not any(words in done.stderr for words in AWAY):
            break
        time.sleep(pause)
    return done


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS, env=environment)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed here")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]} does not answer")
