"""The run folder: made once, checked and its launch recorded at every start."""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from launch.outcome import forget_outcome, read_outcome
from launch.provenance import describe_launch
from ngpt.config.checkpoints import TRACKER_FILE, has_checkpoint, newest_step
from ngpt.config.compose import dump, load
from ngpt.config.errors import ConfigError
from ngpt.config.identity import diff, flatten, model_defining
from ngpt.config.schema import Config
from ngpt.progress import HEARTBEATS

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
DIFF_FILE = "code.diff"
SUMMARY_FILE = "summary.json"
CONSOLE_FILE = "console.log"
LOCK_FILE = ".lock"
FAILURE_PATTERN = "failure_rank*.json"
_LOST_PEER = re.compile(
    r"Connection (reset|closed|refused)|Broken pipe|[Tt]imed out|remote process exited|Socket Timeout|peer|NCCL .*(abort|unhandled system)"
)

Changes = dict[str, tuple[Any, Any]]  # key -> (old, new)


def check_resumable(config: Config) -> None:
    """Refuses a run folder, or weights to start from, of another model: checkpoints and metrics would not fit.

    Raises:
        ConfigError: with every model-defining key that differs, old and new.
    """
    own = Path(config.run.dir) / CONFIG_FILE
    if own.exists() and (changes := diff(model_defining(load(own)), model_defining(config))):
        raise ConfigError(
            "run.dir",
            f"{config.run.dir} holds a run of another model ({_listed(changes)})",
            "a run keeps its model when it resumes",
            "Give the new run a name of its own, run.name=..., or remove the folder",
        )
    if own.exists() and newest_step(config) is not None and not config.megatron.get("override_opt_param_scheduler"):
        changes = diff(_schedule(load(own)), _schedule(config))
        if changes:
            raise ConfigError(
                "run.dir",
                f"{config.run.dir} holds a checkpoint of another schedule ({_listed(changes)})",
                "a resumed run keeps its schedule and batch",
                "Restore the values; or start a new run.name from its weights, checkpoint.load=...; or replace the schedule at the "
                "checkpoint's step with megatron.override_opt_param_scheduler=true",
            )
    if config.checkpoint.load is None:
        return
    if not has_checkpoint(config.checkpoint.load):
        inside = Path(config.checkpoint.load) / "checkpoints"
        way_out = f"Set checkpoint.load={inside}" if has_checkpoint(inside) else "Name the checkpoints folder of a run that saved one"
        raise ConfigError(
            "checkpoint.load", config.checkpoint.load, f"it holds no finished checkpoint ({TRACKER_FILE} is missing)", way_out
        )
    source = Path(config.checkpoint.load).parent / CONFIG_FILE
    if source.exists() and (changes := _of_model(diff(model_defining(load(source)), model_defining(config)))):
        raise ConfigError(
            "checkpoint.load",
            f"{config.checkpoint.load} holds another model ({_listed(changes)})",
            "a run starts from weights of its own model",
            f"Set the keys as in {source}, or load another checkpoint",
        )


def nothing_left(config: Config) -> str | None:
    """Why a start of this run would train no step; None where it would."""
    step, end = newest_step(config), config.train.stop_after or config.train.steps
    if step is None or step < end:
        return None
    limit = "train.stop_after" if config.train.stop_after else "train.steps"
    return f"{config.run.dir} has reached step {step}; {limit} is {end}: nothing to train"


def _schedule(config: Config) -> dict[str, Any]:
    """What Megatron's restored scheduler and sample count hold a run to."""
    flat = flatten(config)
    kept = {"optim.lr", "optim.min_lr", "train.steps", "train.global_batch_size"}
    return {key: value for key, value in flat.items() if key in kept or (key.startswith("schedule.") and key != "schedule.name")}


def changed_data(config: Config) -> str | None:
    """A note for a resumed run that goes on with other data or another seed than the folder's last launch; None where it does not."""
    own = Path(config.run.dir) / CONFIG_FILE
    if not own.exists() or newest_step(config) is None:
        return None
    changes = diff(flatten(load(own)), flatten(config))
    changes = {
        key: change for key, change in changes.items() if key == "train.seed" or (key.startswith("data.") and key != "data.num_workers")
    }
    return f"note: the run goes on with {_listed(changes)}" if changes else None


def _listed(changes: Changes) -> str:
    return "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())


def _of_model(changes: Changes) -> Changes:
    return {key: change for key, change in changes.items() if key.startswith("model.")}


_held: list[IO[str]] = []  # locks that end with this process


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run folder for this launch: two in one folder would overwrite each other's checkpoints and metrics.

    A launch needs the lock for itself and then shares it with its ranks (`join_lock`), so that it lives as long as any of them, however the
    launcher ends. File systems without locks get none.

    Raises:
        ConfigError: another launch, or a rank of one, holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            way_out = "Wait for it, stop it, or choose another run.name"
            raise ConfigError("run.dir", str(folder), f"Is being trained by {holder}, or its ranks are still leaving", way_out) from None
        except OSError:  # no locks here
            pass
        yield


def join_lock(folder: Path) -> None:
    """Holds the run folder together with the launch that started this rank, to the end of the process.

    To be called once the ranks have met: then the launch holds the lock.
    """
    with suppress(OSError):  # no locks here, or a disk that this machine does not share with rank 0
        file = (folder / LOCK_FILE).open("r", encoding="utf-8")
        _held.append(file)
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def record_launch(config: Config, command: Sequence[str], variables: dict[str, str]) -> Path:
    """Writes config, code state and environment of this launch into the run folder; those of earlier launches move to `launches/`.

    Returns:
        The path of the config that workers read.
    """
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    _keep_earlier_launch(folder)
    for left in [*folder.glob(FAILURE_PATTERN), *folder.glob(f"{HEARTBEATS}/rank*.json")]:
        left.unlink()
    forget_outcome(folder)
    description, code_diff = describe_launch(command, variables)
    if code_diff:
        (folder / DIFF_FILE).write_text(code_diff, encoding="utf-8")
    (folder / ENVIRONMENT_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    unfinished = folder / (CONFIG_FILE + ".partial")
    dump(config, unfinished)
    unfinished.replace(folder / CONFIG_FILE)  # other ranks see the old file or the whole new one
    return folder / CONFIG_FILE


def record_failure(folder: Path, rank: int, error: BaseException, time: float) -> None:
    """Called by a worker that ends in an error: one file a rank, since the first of several is the cause and the rest follow it."""
    # CUDA and NCCL append advice to their first line; the lines of a ConfigError are one mistake each.
    message = str(error) if isinstance(error, ConfigError) else str(error).partition("\n")[0]
    failure = {"rank": rank, "time": time, "error": type(error).__name__, "message": message}
    folder.mkdir(parents=True, exist_ok=True)  # on a disk that this machine does not share with rank 0 it may be missing
    (folder / f"failure_rank{rank}.json").write_text(json.dumps(failure) + "\n", encoding="utf-8")


def record_death(folder: Path, rank: int, code: int, time: float) -> None:
    """Called by whoever started a rank that could not say itself why it ended.

    Args:
        code: -n where signal n ended it, else its exit code.
    """
    if (folder / f"failure_rank{rank}.json").exists() or read_outcome(folder) is not None:
        return
    what = f"ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        what += ": killed from outside, for instance by the kernel where memory ran out (dmesg says so)"
    failure = {"rank": rank, "time": time, "error": "died", "message": what}
    (folder / f"failure_rank{rank}.json").write_text(json.dumps(failure) + "\n", encoding="utf-8")


def first_failure(folder: Path) -> dict[str, Any] | None:
    """The cause among the failures that ranks recorded in this launch: the earliest that is not the loss of another rank."""
    failures = []
    for path in folder.glob(FAILURE_PATTERN):
        with suppress(OSError, ValueError):
            failures.append(json.loads(path.read_text(encoding="utf-8")))
    return min(failures, key=lambda failure: (lost_a_peer(failure), failure["time"]), default=None)


def lost_a_peer(failure: dict[str, Any]) -> bool:
    """Whether a rank failed only because another one had gone, as gloo, NCCL and the store word it."""
    return _LOST_PEER.search(failure["message"]) is not None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _keep_earlier_launch(folder: Path) -> None:
    earlier = [folder / name for name in (CONFIG_FILE, ENVIRONMENT_FILE, DIFF_FILE)]
    if not earlier[0].exists():
        return
    kept = folder / "launches"
    number = 1 + sum(1 for path in kept.iterdir()) if kept.exists() else 1
    target = kept / f"{number:03d}"
    target.mkdir(parents=True)
    for path in earlier:
        if path.exists():
            shutil.copy2(path, target / path.name)  # not moved: other ranks read config.yaml at any time
    earlier[-1].unlink(missing_ok=True)
