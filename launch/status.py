"""`ngpt status RUN`: what a run is doing, from its folder and, if it is a job, from the scheduler."""

import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ngpt.checkpoints.choice import choose_by_sizes, folder_of, listing
from ngpt.checkpoints.manifest import BACKEND_FILE, holds_weights_alone
from ngpt.config.compose import load
from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.durations import duration
from ngpt.files import last_lines
from ngpt.locks import LOCK_FILE, holder
from ngpt.progress import describe, read_heartbeats
from ngpt.shell import in_shell

from .failures import cause
from .hf_exports import weights_folder
from .outcome import OUTCOME_FILE, Outcome, damage
from .run_folder import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, first_failure, outcome_of
from .slurm import scheduler
from .slurm.after import LOG_FILE, STOP_FILE
from .slurm.jobs import JOB_FILE

DAMAGED = f"damaged {OUTCOME_FILE}"


def print_status(run_dir: Path, as_json: bool) -> None:
    """Prints what a run is doing, as one JSON object or as lines."""
    found = status(run_dir)
    print(json.dumps(found, indent=1) if as_json else "\n".join(_lines(found)))


def status(run_dir: Path) -> dict[str, Any]:
    """Everything that is known about a run.

    Raises:
        ConfigError: the folder holds no run.
    """
    config, problem = config_of_run(run_dir)
    folder = _beside(run_dir, config)
    checkpoint = _checkpoint(folder, config)
    job = _job(run_dir)
    heartbeats = read_heartbeats(run_dir)
    steps = [step for step in (_last_metric(run_dir), *(beat.get("step") for beat in heartbeats)) if isinstance(step, int)]
    saved = checkpoint["step"]
    outcome, failure = outcome_of(run_dir), first_failure(run_dir)
    state = state_of(run_dir, scheduler.standing(job["tasks"]) if job else None, outcome, failure)
    if state in ("not running", DAMAGED) and config and saved is not None and saved >= config.train.steps:
        state = "finished"
    if state == "not running" and heartbeats:
        failure = {"rank": 0, "error": "ended without a word", "message": "its launcher was killed, or the machine went down"}
    return {
        "run": str(run_dir),
        "config_problem": problem,
        "state": state,
        "step": max([*steps, saved or 0]),
        "last_step": config and (config.train.stop_after or config.train.steps),
        "checkpoint": checkpoint,
        "weights_alone": _weights_alone(folder, saved),
        "hf": _newest_hf(folder),
        "job": job,
        "launcher": holder(run_dir),
        "stop_requested": (run_dir / STOP_FILE).exists(),
        "heartbeats": _oldest_heartbeat(heartbeats),
        "outcome": (outcome.line or outcome.status) if outcome else damage(run_dir),
        "failure": failure and cause(run_dir, failure),
        "job_log": _last_line(run_dir / LOG_FILE),
        "command": (_json(run_dir / JOB_FILE) or _json(run_dir / ENVIRONMENT_FILE) or {}).get("command"),
    }


def is_run_folder(folder: Path) -> bool:
    """Whether a run was started there."""
    return (folder / CONFIG_FILE).exists() or (folder / LOCK_FILE).exists()


def config_of_run(run_dir: Path) -> tuple[Config | None, str | None]:
    """The config of a run, or what is wrong with it: a running run can be watched and stopped without a valid config.

    Raises:
        ConfigError: the folder holds no run.
    """
    try:
        return load(run_dir / CONFIG_FILE), None
    except ConfigError as error:
        if not (run_dir / LOCK_FILE).exists():
            got = "Not a run" if run_dir.is_dir() else "A file, not a folder" if run_dir.is_file() else "No such folder"
            way_out = "Give the folder of a run, for instance runs/NAME; ngpt status runs lists them"
            raise ConfigError(str(run_dir), got, f"A run folder holds {CONFIG_FILE}", way_out) from error
        return None, str(error).splitlines()[0]


def state_of(run_dir: Path, job: str | None, outcome: Outcome | None, failure: Mapping[str, Any] | None) -> str:
    """running | pending | finished | stopped | signalled | failed | not running | damaged outcome.json.

    Args:
        job: running | pending; None if it has no job.
        outcome, failure: as its last launch recorded them.
    """
    if holder(run_dir) is not None:
        return "running"
    if job is not None:
        return job
    if outcome is not None:
        return outcome.status
    if failure is not None:
        return "failed"
    return DAMAGED if damage(run_dir) else "not running"


def _beside(run_dir: Path, config: Config | None) -> Path:
    """The folder of checkpoints. A run folder that was moved took its checkpoints with it."""
    own = run_dir / "checkpoints"
    return own if own.is_dir() or config is None else Path(config.checkpoint.dir)


def _checkpoint(folder: Path, config: Config | None) -> dict[str, Any]:
    """The checkpoint that the next launch would take, judged by names and sizes, and what is wrong with those it would skip."""
    try:
        choice = choose_by_sizes(folder, config.checkpoint.fallback, config.checkpoint.verify) if config else choose_by_sizes(folder)
    except ConfigError as error:
        return {"step": None, "age_s": None, "problem": str(error)}
    if choice is None:
        return {"step": None, "age_s": None, "problem": None}
    return {"step": choice.step, "age_s": _age(choice.folder / BACKEND_FILE), "problem": choice.note()}


def _weights_alone(folder: Path, step: int | None) -> str | None:
    """The folder of checkpoints if that of `step` has no optimizer state, so that no run can resume from it."""
    return str(folder) if step is not None and holds_weights_alone(folder_of(folder, step)) else None


def _newest_hf(folder: Path) -> str | None:
    """The newest weights that `checkpoint.hf` has written."""
    written = (weights_folder(folder_of(folder, step)) for step in listing(folder).steps)
    return next((str(path) for path in written if path.is_dir()), None)


def _job(run_dir: Path) -> dict[str, Any] | None:
    record = _json(run_dir / JOB_FILE)
    if not record or not record.get("job"):
        return None
    try:
        return {"id": record["job"], "tasks": scheduler.queue(record["job"])}
    except ConfigError as error:
        return {"id": record["job"], "tasks": [], "problem": str(error)}


def _oldest_heartbeat(heartbeats: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The rank whose heartbeat is oldest: if a run hangs, it shows where."""
    timed = [beat for beat in heartbeats if isinstance(beat.get("time"), int | float)]
    if not timed:
        return None
    oldest = min(timed, key=lambda beat: beat["time"])
    with suppress(KeyError):
        oldest = oldest | {"where": describe(oldest["operation"], oldest["step"], oldest["microbatch"])}
    return {"ranks": len(timed), "oldest": oldest, "oldest_age_s": round(max(0.0, time.time() - oldest["time"]), 1)}


def _json(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else None
    return None


def _last_line(path: Path) -> str | None:
    lines = last_lines(path)
    return lines[-1] if lines else None


def _last_metric(run_dir: Path) -> int | None:
    with suppress(ValueError, TypeError, KeyError):
        return json.loads(_last_line(run_dir / METRICS_FILE) or "null")["step"]
    return None


def _age(path: Path) -> int | None:
    with suppress(OSError):
        return round(max(0.0, time.time() - path.stat().st_mtime))
    return None


def _lines(found: dict[str, Any]) -> Iterator[str]:
    end = "" if found["last_step"] is None else f" of {found['last_step']}"
    yield f"{found['run']}: {found['state']}, step {found['step']}{end}"
    if found["config_problem"]:
        yield f"config      {found['config_problem']}"
    saved = found["checkpoint"]
    if saved["step"] is None:
        yield "checkpoint  none"
    else:
        yield f"checkpoint  step {saved['step']}" + (f", {duration(saved['age_s'])} old" if saved["age_s"] is not None else "")
    if saved["problem"]:
        yield f"            {saved['problem']}"
    if found["hf"]:
        yield f"hf          {found['hf']}"
    if found["job"]:
        yield from _job_lines(found["job"])
    if launcher := found["launcher"]:
        here = " (this machine)" if launcher["host"] == socket.gethostname() else ""
        yield f"launcher    process {launcher['pid']} on {launcher['host']}{here}"
    if (beats := found["heartbeats"]) and found["state"] == "running":  # otherwise they belong to a run that is over
        oldest = beats["oldest"]
        where = f"rank {oldest.get('rank', '?')} in {oldest.get('where', 'an unknown place')}"
        yield f"heartbeats  {beats['ranks']} ranks; the oldest {duration(beats['oldest_age_s'])} ago: {where}"
    for name, key in (("outcome", "outcome"), ("failure", "failure"), ("job's log", "job_log")):
        if found[key]:
            yield f"{name:<11} {found[key]}"
    if found["stop_requested"]:
        yield "stop        was asked for; the job does not come back"
    yield f"next        {_next(found)}"


def _job_lines(job: dict[str, Any]) -> Iterator[str]:
    if not job["tasks"]:
        yield f"job         {job['id']}, {job.get('problem') or 'no longer in the queue'}"
    for task in job["tasks"]:
        more = f"{task['elapsed']} so far, {task['left']} left, on {task['nodes']}" if task["nodes"] else f"waits: {task['reason']}"
        yield f"job         {task['job']} {task['state']}, {more}"


def _next(found: dict[str, Any]) -> str:
    run = in_shell(found["run"])
    if found["state"] in ("running", "pending"):
        return f"ngpt stop {run}"
    if found["state"] == "finished":
        return f"ngpt report {run}"
    if saved := found["weights_alone"]:
        return f"a new run starts from its weights: checkpoint.load={in_shell(saved)}, as ngpt import --help says"
    command = found["command"] or "the command that started the run continues it"
    return f"with a later train.stop_after, or none: {command}" if found["state"] == "stopped" else command
