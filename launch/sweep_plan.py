"""The plan of a sweep: its folder, its members with their configs, and the checks before one starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError, ConfigErrors
from ngpt.config.overrides import key_of
from ngpt.config.schema import Config
from ngpt.config.sweep import Axis, Point, points, sweep_words
from ngpt.shell import in_shell
from ngpt.sweeps import SWEEP_FILE, Sweep, SweptRun, read_sweep

from .run_folder import CONFIG_FILE, nothing_left, outcome_of

FREE_GROUPS = ("cluster", "logging")  # their keys may change from one launch of a sweep to the next, since they are not what is compared
NAMES = ("run.name", "run.dir")  # each member has its own


@dataclass(frozen=True)
class Planned:
    """A member: its place in the sweep, its config, and the `ngpt` words that train it alone."""

    point: Point
    config: Config
    command: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Plan:
    """A sweep whose members all have valid configs. `fixed`: the words that they share."""

    name: str
    folder: Path
    fixed: list[str]
    axes: list[Axis]
    members: list[Planned]


def plan_sweep(overrides: Sequence[str], config_dirs: Sequence[Path]) -> Plan:
    """Composes every member.

    Raises:
        ConfigError: the words make no sweep, a member's config is invalid, or the sweep's folder holds another sweep.
    """
    fixed, axes = sweep_words(overrides, config_dirs)
    found = points(axes)
    first = _composed(found[0].name, [*fixed, *found[0].words], config_dirs)
    name, folder = _place(fixed, axes, first)
    shared = [word for word in fixed if key_of(word) not in NAMES]
    if first.logging.wandb.group is None and first.logging.wandb.mode != "disabled":
        shared.append(f"logging.wandb.group={name}")
    members = []
    for point in found:
        words = [*shared, *point.words, f"run.name={name}_{point.name}", f"run.dir={folder / point.name}"]
        command = ("train", *words, *(f"--config-dir={path}" for path in config_dirs))
        members.append(Planned(point, _composed(point.name, words, config_dirs), command))
    plan = Plan(name, folder, shared, axes, members)
    _check_apart(plan)
    _check_same_sweep(plan)
    return plan


def check_members(plan: Plan, check: Callable[[Config], object]) -> None:
    """Calls `check` with the config of each member that has something to do; its `ConfigError` then names the member."""
    for member in plan.members:
        if not is_done(member.config):
            _naming(member.point.name, partial(check, member.config))


def is_done(config: Config) -> bool:
    """Whether a run has trained everything that its config asks for."""
    outcome, end = outcome_of(Path(config.run.dir)), config.train.stop_after or config.train.steps
    return nothing_left(config) is not None or (outcome is not None and outcome.exit_code == 0 and (outcome.step or 0) >= end)


def record(plan: Plan, command: Sequence[str]) -> Sweep:
    """The sweep's updated record. Members of earlier launches stay in it."""
    earlier = read_sweep(plan.folder)
    known = {member.name: member for member in earlier.members} if earlier else {}
    fixed = [word for word in plan.fixed if key_of(word).partition(".")[0] not in FREE_GROUPS]
    for member in plan.members:
        swept = known.setdefault(member.point.name, SweptRun(member.point.name, member.point.values, []))
        swept.command = ["ngpt", *member.command]
        if not is_done(member.config):
            swept.status, swept.exit_code, swept.why = "waiting", None, ""
    return Sweep(plan.name, fixed, [axis.key for axis in plan.axes], in_shell(*command), list(known.values()))


def _place(fixed: Sequence[str], axes: Sequence[Axis], first: Config) -> tuple[str, Path]:
    """Name and folder of the sweep."""
    given = {key_of(word) for word in fixed}
    if "run.name" not in given and any(axis.key == "experiment" for axis in axes):
        rule = "A sweep of one experiment is named after it, and this has several"
        raise ConfigError("run.name", "Not set", rule, "Set run.name=NAME, of the whole sweep")
    name = first.run.name if "run.name" in given else f"{first.run.name}-sweep"
    folder = Path(first.run.dir) if "run.dir" in given else Path(PurePath(first.run.root) / name)
    if (folder / CONFIG_FILE).exists():
        raise ConfigError("run.name", f"{folder} holds a run", "A sweep has a folder of its own", "Give the sweep another run.name")
    return name, folder


def _composed(member: str, words: Sequence[str], config_dirs: Sequence[Path]) -> Config:
    return _naming(member, partial(compose, words, config_dirs))


def _naming[T](member: str, call: Callable[[], T]) -> T:
    """Returns what `call` returns; if it raises a `ConfigError`, the error names the member."""
    try:
        return call()
    except ConfigError as error:
        found = error.errors if isinstance(error, ConfigErrors) else [error]
        raise ConfigErrors([ConfigError(f"{member}: {one.path}", one.got, one.rule, one.way_out) for one in found]) from error


def _check_apart(plan: Plan) -> None:
    """Checks that each member writes into a folder of its own."""
    names, folders = {member.point.name.lower() for member in plan.members}, {member.config.checkpoint.dir for member in plan.members}
    if len(names) < len(plan.members):
        rule = "Two members would have the same folder, but for small and capital letters"
        raise ConfigError("-m", str(plan.folder), rule, "Leave one of the values out")
    if len(folders) < len(plan.members):
        rule = "Is the same for several members, and each has checkpoints of its own"
        raise ConfigError("checkpoint.dir", plan.members[0].config.checkpoint.dir, rule, "Leave it out: it follows from run.dir")


def _check_same_sweep(plan: Plan) -> None:
    """Checks that the folder holds only this sweep: members differ in the swept keys and in nothing else."""
    earlier = read_sweep(plan.folder)
    if earlier is None:
        if (plan.folder / SWEEP_FILE).exists():
            rule = "It says what the sweep is"
            raise ConfigError(str(plan.folder / SWEEP_FILE), "Cannot be read", rule, "Restore it, or give another run.name")
        return
    fixed = [word for word in plan.fixed if key_of(word).partition(".")[0] not in FREE_GROUPS]
    differences = [f"{word} is new" for word in fixed if word not in earlier.fixed]
    differences += [f"{word} is missing" for word in earlier.fixed if word not in fixed]
    keys = [axis.key for axis in plan.axes]
    differences += [f"{key} is swept now" for key in keys if key not in earlier.swept]
    differences += [f"{key} is no longer swept; choice(X) sweeps one value" for key in earlier.swept if key not in keys]
    if differences:
        rule = "Members of a sweep differ in the swept keys alone, whose values may be more"
        got = f"{plan.folder} holds another sweep ({'; '.join(differences)})"
        raise ConfigError("run.name", got, rule, "Give the new sweep a name of its own, run.name=NAME")
