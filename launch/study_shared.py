"""Runs that other studies have finished: found by their config and their data, and linked into a study instead of trained again.

And the reverse: branches of a trunk that is not there any more, which are trained again.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ngpt.checkpoints import tracker
from ngpt.config.compose import load
from ngpt.config.errors import ConfigError
from ngpt.config.identity import flatten
from ngpt.config.schema import Config
from ngpt.files import keep_aside
from ngpt.study.plan import OF_EXECUTION, Plan, PlannedRun, flat, is_ended

from .outcome import read_outcome
from .resume_checks import has_data_of
from .run_folder import CONFIG_FILE, SUMMARY_FILE, locked

WORDS_FILE = "words.json"  # in the folder of each study: its runs with their words
CHECKPOINTS = "checkpoints"
# Two runs whose configs differ in these keys alone are the same run. They name places, the file that values came from, who is shown the
# figures, and how a job is asked for. `checkpoint.load` is compared as the folder that it leads to.
_FILES = ("model", "precision", "optim", "schedule", "data", "tokenizer", "parallel", "cluster", "logging", "checkpoint", "debug")
_PLACES = ("run.name", "run.root", "run.dir", "checkpoint.dir", "checkpoint.load", "data.cache_dir")
_SHOWN = ("logging.tensorboard", "logging.wandb.mode", "logging.wandb.project", "logging.wandb.entity", "logging.wandb.group")
_ASKED = ("scheduler", "account", "partition", "qos", "time_limit", "cpus_per_task", "sbatch", "rendezvous_port", "hang_timeout_s")
_JOB = ("container_image", "container_mounts", "save_time_s", "save_margin_s", "max_restarts")
IGNORED = frozenset(
    [*_PLACES, *_SHOWN, "logging.wandb.tags", "data.num_workers"]
    + [f"{group}.name" for group in _FILES]
    + [f"cluster.{name}" for name in (*_ASKED, *_JOB)]
)


def is_done(folder: Path, trunk: bool) -> bool:
    """Whether a folder has a run, a trunk or not, that has trained all its steps."""
    status = _status(folder)
    return status is not None and is_ended(status, trunk)


def words_of(folder: Path) -> dict[str, list[str]]:
    """The words of the runs that a study's folder was made with; {} if that is not known."""
    try:
        known = json.loads((folder / WORDS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def study_of(folder: Path) -> str | None:
    """The name of the study that a folder's own runs were trained for; None if it has none."""
    for name in words_of(folder):
        own = folder / name
        config = None if own.is_symlink() else _config(own)
        if config is not None:
            return config.run.name.removesuffix(f"_{flat(name)}")
    return None


def compared(config: Config) -> dict[str, Any]:
    """What must be equal in the configs of two runs for one to take the place of the other."""
    return {key: value for key, value in flatten(config).items() if key not in IGNORED}


def digest(config: Config) -> str:
    """The sha256 of what must be equal for a run made elsewhere to count: as `compared`, less what says where a run executes.

    What has its default is left out, so that a key that a later version adds does not change it.
    """
    default = flatten(Config())
    values = {key: value for key, value in compared(config).items() if not key.startswith(OF_EXECUTION) and value != default.get(key)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digest_of(folder: Path) -> str | None:
    """The digest of the config of the run in a folder; None if it cannot be read."""
    known = _config(folder)
    return None if known is None else digest(known)


def continued_another(trunk: Path, branch: Path) -> bool:
    """Whether a branch continued another trunk than the finished one that is there now: this one ended after the branch did.

    Summaries and file times must both say so: copies of a folder have other file times, and the clocks of two hosts differ.
    """
    return _finished(trunk) > _finished(branch) and _modified(trunk) > _modified(branch)


class Shared:
    """Finds a study's runs, in its own folder and in those of the studies beside it.

    Only runs that the folder does not hold yet are taken from another study. A branch is taken only if it continues the checkpoint
    that this study's other branches continue: pairs of branches have a common start.

    Args:
        plan: the study.
        folder: its folder. Those beside it that hold a `words.json` are searched.
        points: the config of one run of each point, by the name of every run; it may have another seed, or other values of `optim`.
        composed: the config of a run.
    """

    def __init__(self, plan: Plan, folder: Path, points: Mapping[str, Config], composed: Callable[[PlannedRun], Config]):
        self.plan, self.folder, self.points = plan, folder, points
        self.runs = {run.name: run for run in plan.runs}
        self.composed = cache(lambda name: composed(self.runs[name]))

    def place(self, name: str) -> Path | None:
        """Where a run of the plan is finished: its own folder, or one of another study. None: it is still to be trained."""
        run, own = self.runs[name], self.folder / name
        if own.is_symlink():
            return self._linked(run) or self._found(run)
        if own.exists():
            return own if is_done(own, self.plan.is_trunk(run)) and not self._has_another_start(run) else None
        return self._found(run)

    def outdated(self) -> list[str]:
        """The branches in the study's folder that continued another trunk than the one that is there now, or will be trained."""
        begun = [run for run in self.plan.runs if run.after is not None and self._has_begun(run.name)]
        return [run.name for run in begun if run.after and (self._is_trained_again(run.after) or self._has_another_start(run))]

    def set_aside(self, names: Collection[str]) -> None:
        """Moves the folders of outdated branches aside, so that they are trained again."""
        for name in names:
            own = self.folder / name
            with locked(own):
                kept = keep_aside(own)
            print(f"{name} is trained again: it continued a trunk that is not there any more. It is kept as {kept}", flush=True)

    def take(self, name: str) -> bool:
        """Whether a run is finished. If another study has it, the study's folder links to it from now on.

        A link that leads to no finished run any more is removed. Call it once the trunk of a branch is finished.
        """
        own = self.folder / name
        if own.is_symlink() and self._linked(self.runs[name]) is None:
            print(f"{name}: the run that it was taken from, {own.readlink()}, is gone, or is another run now", flush=True)
            own.unlink()
        place = self.place(name)
        if place is None or place == own or own.is_symlink():
            return place is not None
        own.parent.mkdir(parents=True, exist_ok=True)
        own.symlink_to(os.path.relpath(place.resolve(), own.parent.resolve()))
        print(f"{name} is taken from {place}", flush=True)
        return True

    def _linked(self, run: PlannedRun) -> Path | None:
        """The run that the study's folder links to, if it is still what it was taken for."""
        target = (self.folder / run.name).resolve()
        return target if self._is_same(run, target) else None

    def _start(self, run: PlannedRun) -> Path | None:
        """The folder of the checkpoint that a branch continues."""
        if run.after is None:
            return None
        return ((self.place(run.after) or self.folder / run.after) / CHECKPOINTS).resolve()

    def _has_begun(self, name: str) -> bool:
        """Whether the study's folder has a run, of its own, that is finished or goes on from a checkpoint of its own."""
        own = self.folder / name
        return not own.is_symlink() and (is_done(own, trunk=False) or tracker.read(own / CHECKPOINTS).step is not None)

    def _is_trained_again(self, trunk: str) -> bool:
        """Whether a trunk will be trained. One that has trained all its steps and lacks its summary is not, until its folder is removed."""
        own = self.folder / trunk
        return self.place(trunk) is None and (own.is_symlink() or not _lost_its_summary(own))

    def _has_another_start(self, run: PlannedRun) -> bool:
        """Whether a branch in the study's folder continued another trunk than the one there now. If there is none, nobody knows."""
        place = None if run.after is None else self.place(run.after)
        if run.after is None or place is None:
            return False
        own = self.folder / run.after
        return place.resolve() != own.resolve() or continued_another(place, self.folder / run.name)

    def _found(self, run: PlannedRun) -> Path | None:
        """The same run in a study beside this one."""
        for folder in self._others():
            if self._is_same(run, folder) and _has_its_checkpoint(folder):  # branches and analyses need it
                return folder
        return None

    def _is_same(self, run: PlannedRun, folder: Path) -> bool:
        """Whether a folder holds this run, finished: the same config, the same data and, for a branch, the same start."""
        if not is_done(folder, self.plan.is_trunk(run)) or (known := _config(folder)) is None:
            return False
        start = self._start(run)
        if _start(known) != start or (start is not None and continued_another(start.parent, folder)):
            return False
        if _but_seed_and_rates(known) != _but_seed_and_rates(self.points[run.name]):
            return False  # composing takes half a second, and only a run that may fit is worth it
        config = self.composed(run.name)
        return compared(known) == compared(config) and has_data_of(config, folder)

    def _others(self) -> Iterator[Path]:
        """The runs of the studies beside this one. Links are left out: they lead to other runs of this list."""
        for words in sorted(self.folder.parent.glob(f"*/{WORDS_FILE}")):
            if words.parent.resolve() == self.folder.resolve():
                continue
            yield from (place for name in words_of(words.parent) if not (place := words.parent / name).is_symlink())


def _has_its_checkpoint(folder: Path) -> bool:
    """Whether a run has a checkpoint, if its config asks for one."""
    known = _config(folder)
    saves = known is not None and (known.checkpoint.save_at_end or known.checkpoint.interval is not None)
    return not saves or tracker.read(folder / CHECKPOINTS).step is not None


def _status(folder: Path) -> str | None:
    """How a run ended, as its summary says it; None if there is none, or a damaged one."""
    try:
        return str(json.loads((folder / SUMMARY_FILE).read_bytes())["status"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _lost_its_summary(folder: Path) -> bool:
    """Whether a run has trained all that its last launch was to train, and its summary is gone or damaged."""
    outcome = read_outcome(folder)
    return outcome is not None and outcome.exit_code == 0 and _status(folder) is None


def _finished(folder: Path) -> str:
    """When a run ended, as its summary says it. Later than all, if that is not known."""
    try:
        return str(json.loads((folder / SUMMARY_FILE).read_bytes())["finished_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return "never"


def _modified(folder: Path) -> float:
    """When its summary was written, by the clock of the file system. Later than all, if there is none."""
    try:
        return (folder / SUMMARY_FILE).stat().st_mtime
    except OSError:
        return math.inf


def _config(folder: Path) -> Config | None:
    """The config of a run; None if it cannot be read."""
    path = folder / CONFIG_FILE
    try:
        return _loaded(path, path.stat().st_mtime_ns)
    except (OSError, ConfigError):
        return None


@cache
def _loaded(path: Path, _changed: int) -> Config:
    return load(path)


def _start(config: Config) -> Path | None:
    return None if config.checkpoint.load is None else Path(config.checkpoint.load).resolve()


def _but_seed_and_rates(config: Config) -> dict[str, Any]:
    return {key: value for key, value in compared(config).items() if key != "train.seed" and not key.startswith("optim.")}
