"""The run folder: made once; every start checks it and records its launch."""

import json
import math
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ngpt import locks
from ngpt.config.checkpoints import newest_step, newest_verified_step
from ngpt.config.compose import load, to_yaml
from ngpt.config.errors import ConfigError
from ngpt.config.identity import diff, flatten, listed
from ngpt.config.schema import Config
from ngpt.files import replacing
from ngpt.places import check_place
from ngpt.progress import FAILURE_FILE, HEARTBEATS, read_records, write_json

from .outcome import OUTCOME_FILE, SIGNALLED_CODE, Outcome, read_outcome
from .provenance import describe_launch
from .resume_checks import SOURCES_FILE, record_sources

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
DIFF_FILE = "code.diff"
_TEXT = ("data.mock", "data.train", "data.valid", "tokenizer.")  # keys that say what is read
SUMMARY_FILE = "summary.json"
CONSOLE_FILE = "console.log"
METRICS_FILE = "metrics.jsonl"
_LOST_PEER = re.compile(
    r"Connection (reset|closed|refused)|Broken pipe|[Tt]imed out|remote process exited|Socket Timeout|peer|NCCL .*(abort|unhandled system)"
)


def nothing_left(config: Config, verify: bool = False) -> str | None:
    """Why starting this run would train no step; None if it would train.

    Args:
        verify: With checkpoint.verify=full, read the whole checkpoint that this rests on: nothing else will check it.

    Raises:
        ConfigError: no published checkpoint is intact.
    """
    step, end = newest_step(config), config.train.stop_after or config.train.steps
    if verify and step is not None and step >= end and config.checkpoint.verify == "full":
        step = newest_verified_step(config)
    if step is None or step < end:
        return None
    limit = "train.stop_after" if config.train.stop_after else "train.steps"
    return f"{config.run.dir} has reached step {step}; {limit} is {end}: nothing to train{_unused(config)}"


def _unused(config: Config) -> str:
    """Says which values of its text a finished run was not trained with; "" if there are none."""
    own = Path(config.run.dir) / CONFIG_FILE
    with suppress(ConfigError, OSError):
        changes = diff(flatten(load(own)), flatten(config))
        if changed := {key: change for key, change in changes.items() if key.startswith(_TEXT)}:
            return f". It was trained with other values ({listed(changed)}): a new run.name trains with these"
    return ""


def lock_folders(config: Config) -> dict[str, Path]:
    """Key -> folder that only one launch at a time may write: the run's, and that of its checkpoints."""
    run_dir, checkpoint_dir = Path(config.run.dir), Path(config.checkpoint.dir)
    saves = config.checkpoint.save_at_end or config.checkpoint.interval is not None
    apart = saves and checkpoint_dir.resolve() != run_dir.resolve()
    return {"run.dir": run_dir} | ({"checkpoint.dir": checkpoint_dir} if apart else {})


@contextmanager
def locked_run(config: Config) -> Iterator[None]:
    """Locks every folder of `lock_folders`.

    Raises:
        ConfigError: another launch, or one of its ranks, holds one of the locks.
    """
    with ExitStack() as stack:
        for key, folder in lock_folders(config).items():
            stack.enter_context(locked(folder, key))
        yield


@contextmanager
def locked(folder: Path, key: str = "run.dir") -> Iterator[None]:
    """Locks a folder of a run for this launch: two launches in one folder would overwrite each other's checkpoints and metrics.

    Raises:
        ConfigError: another launch, or one of its ranks, holds the lock; the folder cannot be made.
    """
    check_place(key, folder)
    folder.mkdir(parents=True, exist_ok=True)
    rule = "Is being trained by {holder}, or its ranks are still leaving"
    with locks.locked(folder, key, rule, "Wait for it, stop it, or choose another run.name"):
        yield


def join_locks(config: Config) -> None:
    """Shares the locks of the launch that started this rank, until this process ends.

    Call it once the ranks have met: by then the launch holds the locks.
    """
    for folder in lock_folders(config).values():
        locks.join_lock(folder)


def record_launch(
    config: Config,
    command: Sequence[str],
    variables: dict[str, str],
    origins: dict[str, str] | None = None,
    forget_before: float = math.inf,
) -> Path:
    """Writes config, code state and environment of this launch into the run folder; those of earlier launches move to `launches/`.

    Args:
        variables: Environment variables worth recording.
        origins: Where the variables that the launcher sets get their values from (`variable_origins`).
        forget_before: Records of how an earlier launch ended are removed if written before this time (seconds since the epoch). In a
            world started by srun, other ranks may already have recorded failures of this launch.

    Returns:
        The path of the config file that workers read.
    """
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    _keep_earlier_launch(folder)
    patterns = (FAILURE_FILE.format(rank="*"), f"{HEARTBEATS}/rank*.json", ".*.partial", f"{HEARTBEATS}/.*.partial", OUTCOME_FILE)
    for left in (path for pattern in patterns for path in folder.glob(pattern)):
        with suppress(FileNotFoundError):
            if left.stat().st_mtime < forget_before:
                left.unlink()
    description, code_diff = describe_launch(command, variables)
    description |= {"environment_from": origins} if origins else {}
    if code_diff:
        (folder / DIFF_FILE).write_text(code_diff, encoding="utf-8")
    (folder / ENVIRONMENT_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    record_sources(config)
    with replacing(folder / CONFIG_FILE, synced=False) as stream:  # other ranks see the old file or the whole new one
        stream.write(to_yaml(config).encode())
    return folder / CONFIG_FILE


def record_failure(folder: Path, rank: int, error: BaseException, when: float) -> None:
    """Called by a worker that ends in an error. One file per rank, since the first failure is the cause and the others follow from it."""
    # CUDA and NCCL append advice below their first line; each line of a ConfigError is a mistake of its own.
    mistake = isinstance(error, ConfigError)
    message = str(error) if mistake else str(error).partition("\n")[0]
    failure = {"rank": rank, "time": when, "error": type(error).__name__, "message": message, "mistake": mistake}
    with suppress(OSError):  # a full disk may itself be the failure
        write_json(folder / FAILURE_FILE.format(rank=rank), failure)


def record_death(folder: Path, rank: int, code: int, when: float) -> None:
    """Called by the process that started a rank that could not record itself why it ended.

    Args:
        code: -n if signal n ended it, else its exit code.
    """
    path, outcome = folder / FAILURE_FILE.format(rank=rank), read_outcome(folder)
    if path.exists() or code == SIGNALLED_CODE or (outcome is not None and not outcome.left_during_start_up):
        return
    with suppress(OSError):
        write_json(path, {"rank": rank, "time": when, "error": "died", "message": describe_death(code)})


def describe_death(code: int) -> str:
    """How a process ended that could not say so itself, from its exit code (-n: signal n)."""
    what = f"ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        what += ": killed from outside, for instance by the kernel where memory ran out (dmesg says so)"
    return what


def record_interrupt(folder: Path) -> None:
    """Called after a second Ctrl-C has killed the ranks: their recorded deaths were intended."""
    for path in folder.glob(FAILURE_FILE.format(rank="*")):
        path.unlink(missing_ok=True)
    failure = {"rank": 0, "time": time.time(), "error": "interrupted", "message": "a second Ctrl-C killed the workers"}
    with suppress(OSError):
        write_json(folder / FAILURE_FILE.format(rank=0), failure)


def first_failure(folder: Path) -> dict[str, Any] | None:
    """The failure that caused the others in this launch: the earliest that is not the loss of another rank."""
    failures = read_records(folder, FAILURE_FILE.format(rank="*"))
    return min(failures, key=lambda failure: (lost_a_peer(failure), failure.get("time", 0.0)), default=None)


def outcome_of(folder: Path) -> Outcome | None:
    """The outcome that the last launch recorded, if that is how it ended.

    If a rank fails during start-up, the others are told to leave, and record that as a signal.
    """
    outcome, failure = read_outcome(folder), first_failure(folder)
    failed = failure is not None and not lost_a_peer(failure)
    return None if outcome is not None and outcome.left_during_start_up and failed else outcome


def lost_a_peer(failure: Mapping[str, Any]) -> bool:
    """Whether a rank failed only because it lost another one, judged by the error messages of gloo, NCCL and the store."""
    return _LOST_PEER.search(failure.get("message", "")) is not None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _keep_earlier_launch(folder: Path) -> None:
    earlier = [folder / name for name in (CONFIG_FILE, ENVIRONMENT_FILE, SOURCES_FILE, DIFF_FILE)]
    if not earlier[0].exists():
        return
    kept = folder / "launches"
    number = 1 + sum(1 for path in kept.iterdir()) if kept.exists() else 1
    target = kept / f"{number:03d}"
    target.mkdir(parents=True)
    for path in earlier:
        if path.exists():
            shutil.copy2(path, target / path.name)  # copied, not moved: other ranks may read config.yaml at any time
    earlier[-1].unlink(missing_ok=True)
