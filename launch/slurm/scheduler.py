"""SLURM's commands: submit, query, requeue, signal, cancel."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ngpt.config.errors import ConfigError

SECONDS = 60  # a busy controller may take this long to answer
PAUSES = (2, 5, 10, 0)  # seconds to wait after each failed attempt
AWAY = (
    "does not answer",
    "Unable to contact slurm controller",
    "Socket timed out",
    "Connection refused",
    "Zero Bytes were transmitted",
    "Unexpected message received",  # all that `scontrol requeue` of SLURM 22.05 prints if there is no controller
)


@dataclass(frozen=True)
class JobState:
    """What `scontrol show job` reports for one job, or one task of an array."""

    state: str  # PENDING | RUNNING | COMPLETING | ...
    reason: str
    restarts: int
    preempted: bool


def submit(script: Path, environment: Mapping[str, str]) -> str:
    """Submits a script and returns the job's id.

    Raises:
        ConfigError: SLURM refuses it, or is not installed.
    """
    done = _run(["sbatch", "--parsable", str(script)], environment)
    if done.returncode != 0:
        raise ConfigError("sbatch", done.stderr.strip() or "no answer", "SLURM refuses the job", f"Correct cluster.*; script: {script}")
    return done.stdout.strip().partition(";")[0]  # ";cluster" follows if there are several clusters


def job_state(job: str) -> JobState | None:
    """The job's state; None if SLURM does not know the job, or does not answer."""
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


def standing(tasks: Sequence[Mapping[str, str]]) -> str | None:
    """running | pending, for the tasks of a job as `queue` lists them; None if there are none."""
    if any(task["state"] in ("RUNNING", "COMPLETING") for task in tasks):
        return "running"
    return "pending" if tasks else None


def queue(job: str, each_task: bool = False) -> list[dict[str, str]]:
    """The waiting or running entries of a job, one dict each; empty if there are none.

    Args:
        each_task: List each task of an array; otherwise its waiting tasks are one entry.

    Raises:
        ConfigError: SLURM does not answer, so it is unknown whether the job runs.
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
    """Ends a running job and puts it back into the queue. Returns None, or why SLURM refuses. A caller inside the job is ended too."""
    return _complaint(_insist(["scontrol", "requeue", job]))


def signal_tasks(job: str) -> str | None:
    """Sends SIGTERM to the tasks of a job's steps, but not to its script. Returns None, or why SLURM refuses."""
    return _complaint(_run(["scancel", "--signal=TERM", job]))


def cancel(job: str) -> str | None:
    """Removes a waiting job from the queue. Returns None, or why SLURM refuses."""
    return _complaint(_run(["scancel", job]))


def _complaint(done: subprocess.CompletedProcess) -> str | None:
    return None if done.returncode == 0 else " ".join(done.stderr.split()) or f"exit code {done.returncode}"


def _insist(command: list[str]) -> subprocess.CompletedProcess:
    """Retries while the controller is briefly away: if the request to requeue is lost, the job does not restart."""
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
