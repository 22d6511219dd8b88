"""Decides, when a job's srun has ended, whether the job restarts: `python -m launch.slurm.after RUN --code N | --out-of-time`.

It reads what happened from three places: the `stop` file that `ngpt stop` leaves, SLURM's state of the job, and the run's outcome.json.
The batch script (job.sbatch) calls it with SIGTERM ignored. It needs no torch, and only two values of the config.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ngpt.checkpoints import tracker

from ..environment import Job, current_job
from ..failures import cause
from ..outcome import SIGNALLED_CODE, Outcome
from ..run_folder import CONFIG_FILE, first_failure, lost_a_peer, outcome_of
from . import scheduler
from .scheduler import JobState

STOP_FILE = "stop"
LOG_FILE = "slurm.log"  # one line for each time the job ends
RESTARTS_FILE = "restarts.json"
FAILURE, USER_ERROR, TERMINATED = 1, 2, 143
DEFAULT_MAX_RESTARTS = 3


@dataclass(frozen=True)
class Decision:
    """What to do after a job's ranks have ended.

    Attributes:
        line: the reason, for people.
        code: the batch script's exit code.
        requeue: whether to ask SLURM for a restart.
        counts: whether the restart counts towards cluster.max_restarts. A newer checkpoint resets the count.
    """

    line: str
    code: int
    requeue: bool = False
    counts: bool = True


def decide(code: int, state: JobState | None, job: Job, outcome: Outcome | None, failure: Mapping[str, Any] | None, stop: bool) -> Decision:
    """Decides from how a job's ranks ended.

    Args:
        code: srun's exit code, the largest of its tasks.
        state: What SLURM says about the job; None if it says nothing.
        job: This job, and how often it had been restarted when it started.
        outcome: What the run itself recorded.
        failure: The failure of the rank that failed first, with its `cause` in words.
        stop: Whether `ngpt stop` has asked for this end.
    """
    if outcome is not None and outcome.exit_code == 0:
        return Decision(outcome.status, 0)
    # If a rank fails during start-up, the others are told to leave, and record that as a signal.
    failed = failure is not None and not lost_a_peer(failure)
    signalled = None if outcome is None or outcome.left_during_start_up and failed else outcome.line
    ended = SIGNALLED_CODE if signalled else code or TERMINATED
    if state is not None and state.restarts > job.restarts:
        return Decision("SLURM starts the job again", ended)
    if stop:
        return Decision("stopped as `ngpt stop` asked", ended)
    if state is not None and state.state == "COMPLETING":  # SLURM is ending the job
        if state.preempted:
            return Decision("preempted", ended, requeue=True, counts=False)
        if state.reason == "TimeLimit":
            return Decision("the time was over before the run had left", ended, requeue=True)
        return Decision("cancelled", ended)
    if signalled:
        return Decision(signalled, SIGNALLED_CODE, requeue=True, counts=state is None or not state.preempted)
    if code == 0 and failure is None:
        return Decision("nothing was left to train", 0)
    line = failure["cause"] if failure else f"srun ended with exit code {code}"
    if code == USER_ERROR or failure is not None and failure.get("mistake"):
        return Decision(f"{line}; a restart would repeat it", USER_ERROR)
    return Decision(line, code or FAILURE, requeue=True)


def limit_restarts(decision: Decision, run_dir: Path, step: int | None, limit: int) -> Decision:
    """Refuses a restart beyond `limit` in a row without a newer checkpoint. The count is kept in the run folder."""
    if not decision.requeue or not decision.counts:
        return decision
    path = run_dir / RESTARTS_FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        known, restarts = before["step"], before["restarts"]
    except (OSError, ValueError, TypeError, KeyError):
        known, restarts = None, 0
    if step is not None and (known is None or step > known):
        restarts = 0
    if restarts >= limit:
        line = f"{decision.line}; not started again: {restarts} restarts in a row without a newer checkpoint (cluster.max_restarts)"
        return Decision(line, decision.code)
    restarts += 1
    try:
        path.write_text(json.dumps({"step": step, "restarts": restarts}) + "\n", encoding="utf-8")
    except OSError as error:  # uncounted, restarts could go on forever
        return Decision(f"{decision.line}; not started again: {path}: {error.strerror}", decision.code)
    in_a_row = f" ({restarts} of at most {limit} times without a newer checkpoint)" if restarts > 1 else ""
    return replace(decision, line=f"{decision.line}; starts again{in_a_row}")


def _settings(run_dir: Path) -> tuple[Path, int]:
    """The run's folder of checkpoints, and how many restarts it may have."""
    try:
        config = yaml.safe_load((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
        return Path(config["checkpoint"]["dir"]), int(config["cluster"]["max_restarts"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return run_dir / "checkpoints", DEFAULT_MAX_RESTARTS


def main(arguments: Sequence[str]) -> int:
    """Decides, prints and logs the decision, and asks for the restart. Returns the exit code for the batch script."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.after")
    parser.add_argument("run", type=Path)
    parser.add_argument("--code", type=int, default=TERMINATED, help="of srun")
    parser.add_argument("--out-of-time", action="store_true", help="the ranks go on: act only where the job's time is over")
    options = parser.parse_args(arguments)
    job, run_dir = current_job(), options.run
    if job is None:
        print(f"{__package__}.after is part of a job's script, and this is no job", file=sys.stderr)
        return options.code
    state = scheduler.job_state(job.id)
    out_of_time = state is not None and state.state == "COMPLETING" and (state.reason == "TimeLimit" or state.preempted)
    if options.out_of_time and not out_of_time:
        return 0
    checkpoint_dir, limit = _settings(run_dir)
    step, stop = tracker.read(checkpoint_dir).step, (run_dir / STOP_FILE).exists()
    failure = first_failure(run_dir)
    failure = failure and failure | {"cause": cause(run_dir, failure)}
    decision = decide(options.code, state, job, outcome_of(run_dir), failure, stop)
    decision = limit_restarts(decision, run_dir, step, limit)
    log(run_dir, f"job {job.id} (restart {job.restarts}), newest checkpoint {'none' if step is None else step}: {decision.line}")
    if decision.requeue and (complaint := scheduler.requeue(job.id)) is not None:
        log(run_dir, f"job {job.id} could not be requeued: {complaint}; ngpt launch continues the run")
    return decision.code


def log(run_dir: Path, line: str) -> None:
    """Prints a line and adds it to the run's log of its jobs."""
    print(f"ngpt: {line}", flush=True)
    try:
        with (run_dir / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}\n")
    except OSError as error:
        print(f"ngpt: {run_dir / LOG_FILE}: {error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
