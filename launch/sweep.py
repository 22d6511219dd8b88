"""`ngpt train -m`: a run for each combination of values, all checked before the first starts; the same command again goes on."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError, ConfigErrors
from ngpt.config.schema import Config
from ngpt.config.sweep import Axis, Point, points, sweep_words
from ngpt.durations import duration
from ngpt.sweeps import SWEEP_FILE, Sweep, SweptRun, read_sweep, write_sweep

from .devices import gpu_names
from .environment import current_world
from .many import DONE, FAILED, STOPPED, WAITING, Member, State, run_members
from .outcome import SIGNALLED_CODE
from .run_folder import CONFIG_FILE, locked, nothing_left, outcome_of
from .sweep_progress import Progress
from .sweep_status import glance, table
from .train import check_start

FAILURE = 1
FREE_GROUPS = ("cluster",)  # words on them may change from one launch of a sweep to the next
NAMES = ("run.name", "run.dir")  # a member has its own


@dataclass(frozen=True)
class Planned:
    """A member: its place in the sweep, its config, and the words of `ngpt` that train it alone."""

    point: Point
    config: Config
    command: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Plan:
    """A sweep whose members compose. `fixed`: the words that they share."""

    name: str
    folder: Path
    fixed: list[str]
    axes: list[Axis]
    members: list[Planned]


def plan_sweep(overrides: Sequence[str], config_dirs: Sequence[Path]) -> Plan:
    """Composes every member.

    Raises:
        ConfigError: the words make no sweep, a member does not compose, or the sweep's folder holds another one.
    """
    fixed, axes = sweep_words(overrides, config_dirs)
    found = points(axes)
    first = _composed(found[0].name, [*fixed, *found[0].words], config_dirs)
    name, folder = _place(fixed, axes, first)
    shared = [word for word in fixed if _key(word) not in NAMES]
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
    """Whether a run has trained all that its config asks for."""
    outcome, end = outcome_of(Path(config.run.dir)), config.train.stop_after or config.train.steps
    return nothing_left(config) is not None or (outcome is not None and outcome.exit_code == 0 and (outcome.step or 0) >= end)


def record(plan: Plan, command: Sequence[str]) -> Sweep:
    """What the sweep's folder says from now on: members of earlier launches stay."""
    earlier = read_sweep(plan.folder)
    known = {member.name: member for member in earlier.members} if earlier else {}
    fixed = [word for word in plan.fixed if _key(word).partition(".")[0] not in FREE_GROUPS]
    for member in plan.members:
        swept = known.setdefault(member.point.name, SweptRun(member.point.name, member.point.values, []))
        swept.command = ["ngpt", *member.command]
    return Sweep(plan.name, fixed, [axis.key for axis in plan.axes], shlex.join(command), list(known.values()))


def train_sweep(overrides: Sequence[str], config_dirs: Sequence[Path], command: Sequence[str], parallel: int) -> int:
    """Trains every member that is not done, some at a time.

    Args:
        command: The command line, recorded with the sweep.
        parallel: Members that run at a time.

    Returns:
        0 where all are done; 75 where a signal has ended members and the same command goes on; 1 where one has failed.

    Raises:
        ConfigError: anything that can be known to be wrong before the first member starts.
    """
    if (world := current_world()) is not None:
        way_out = "Call it outside of one; ngpt launch -m makes a sweep an array of jobs"
        raise ConfigError("-m", f"in a world of {world.started_by}", "A sweep starts the processes of its members itself", way_out)
    plan = plan_sweep(overrides, config_dirs)
    _check_parallel(plan, parallel)
    verified = set[str]()
    check_members(plan, lambda config: check_start(config, None, verified))
    with locked(plan.folder):
        sweep = record(plan, command)
        write_sweep(plan.folder, sweep)
        print("\n".join(_announced(plan, parallel)), flush=True)
        on_gpus = bool(gpu_names())
        progress = Progress(plan.folder, sweep, [member.point.name for member in plan.members])
        states = run_members([_member(member, on_gpus) for member in plan.members], parallel, progress)
    print("\n".join(_ended(plan, sweep, states)), flush=True)
    return _exit_code(states)


def _member(planned: Planned, on_gpus: bool) -> Member:
    gpus = planned.config.cluster.gpus_per_node if on_gpus else 0
    return Member(planned.point.name, planned.folder, planned.command, gpus, lambda: is_done(planned.config))


def _exit_code(states: Sequence[State]) -> int:
    if any(state.status in (STOPPED, WAITING) for state in states):
        return SIGNALLED_CODE
    return 0 if all(state.status == DONE for state in states) else FAILURE


def _place(fixed: Sequence[str], axes: Sequence[Axis], first: Config) -> tuple[str, Path]:
    """Name and folder of the sweep."""
    given = {_key(word) for word in fixed}
    if "run.name" not in given and any(axis.key == "experiment" for axis in axes):
        rule = "A sweep of one experiment is named after it, and this has several"
        raise ConfigError("run.name", "Not set", rule, "Set run.name=NAME, of the whole sweep")
    name = first.run.name if "run.name" in given else f"{first.run.name}-sweep"
    folder = Path(first.run.dir) if "run.dir" in given else Path(PurePath(first.run.root) / name)
    if (folder / CONFIG_FILE).exists():
        raise ConfigError("run.name", f"{folder} holds a run", "A sweep has a folder of its own", "Give the sweep another run.name")
    return name, folder


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _composed(member: str, words: Sequence[str], config_dirs: Sequence[Path]) -> Config:
    return _naming(member, partial(compose, words, config_dirs))


def _naming[T](member: str, call: Callable[[], T]) -> T:
    """What `call` returns; a `ConfigError` names the member."""
    try:
        return call()
    except ConfigError as error:
        found = error.errors if isinstance(error, ConfigErrors) else [error]
        raise ConfigErrors([ConfigError(f"{member}: {one.path}", one.got, one.rule, one.way_out) for one in found]) from error


def _check_apart(plan: Plan) -> None:
    """Members write into folders of their own."""
    names, folders = {member.point.name.lower() for member in plan.members}, {member.config.checkpoint.dir for member in plan.members}
    if len(names) < len(plan.members):
        rule = "Two members would have the same folder, but for small and capital letters"
        raise ConfigError("-m", str(plan.folder), rule, "Leave one of the values out")
    if len(folders) < len(plan.members):
        rule = "Is the same for several members, and each has checkpoints of its own"
        raise ConfigError("checkpoint.dir", plan.members[0].config.checkpoint.dir, rule, "Leave it out: it follows from run.dir")


def _check_same_sweep(plan: Plan) -> None:
    """A folder holds one sweep: its members differ in what is swept and in nothing else."""
    earlier = read_sweep(plan.folder)
    if earlier is None:
        if (plan.folder / SWEEP_FILE).exists():
            rule = "It says what the sweep is"
            raise ConfigError(str(plan.folder / SWEEP_FILE), "Cannot be read", rule, "Restore it, or give another run.name")
        return
    fixed = [word for word in plan.fixed if _key(word).partition(".")[0] not in FREE_GROUPS]
    differences = [f"{word} is new" for word in fixed if word not in earlier.fixed]
    differences += [f"{word} is missing" for word in earlier.fixed if word not in fixed]
    keys = [axis.key for axis in plan.axes]
    differences += [f"{key} is swept now" for key in keys if key not in earlier.swept]
    differences += [f"{key} is no longer swept; choice(X) sweeps one value" for key in earlier.swept if key not in keys]
    if differences:
        rule = "Members of a sweep differ in the swept keys alone, whose values may be more"
        got = f"{plan.folder} holds another sweep ({'; '.join(differences)})"
        raise ConfigError("run.name", got, rule, "Give the new sweep a name of its own, run.name=...")


def _check_parallel(plan: Plan, parallel: int) -> None:
    gpus, most = len(gpu_names()), max(member.config.cluster.gpus_per_node for member in plan.members)
    if gpus and parallel > 1 and parallel * most > gpus:
        rule = f"{parallel} members of {most} GPUs (cluster.gpus_per_node) need {parallel * most}, and {gpus} are visible"
        raise ConfigError("--parallel", parallel, rule, f"Set --parallel {max(1, gpus // most)}")


def _announced(plan: Plan, parallel: int) -> list[str]:
    swept = " x ".join(f"{axis.key} ({len(axis.values)})" for axis in plan.axes)
    left = [member for member in plan.members if not is_done(member.config)]
    at_a_time = f", {parallel} at a time" if parallel > 1 else ", one after another"
    done = f", {len(plan.members) - len(left)} done before" if len(left) < len(plan.members) else ""
    lines = [f"sweep {plan.folder}: {len(plan.members)} members, {swept}{at_a_time}{done}"]
    lines.append(f"  output of each: {plan.folder}/MEMBER/console.log; how far they are: ngpt status {shlex.quote(str(plan.folder))}")
    return [*lines, *_estimated([member.config for member in left], parallel)]


def _estimated(configs: Sequence[Config], parallel: int) -> list[str]:
    """How long it takes by the estimate; [] where no GPU is named to estimate for."""
    if not configs or any(config.cluster.gpu is None for config in configs):
        return []
    from ngpt.estimate.report import estimate

    days = sum(estimate(config)["cost"]["days"] for config in configs) / min(parallel, len(configs))
    return [f"  by the estimate {duration(days * 86400)} in all"]


def _ended(plan: Plan, sweep: Sweep, states: Sequence[State]) -> list[str]:
    """The table, and what to do about members that have not come to their end."""
    rows = [(member.name, glance(plan.folder / member.name, member, launcher=False)) for member in sweep.members]
    folder = shlex.quote(str(plan.folder))
    lines = ["", *table(rows), ""]
    failed = [state for state in states if state.status == FAILED]
    for state in failed:
        lines += [f"{state.member.name} failed: {state.why}", f"  {shlex.join(['ngpt', *state.member.command])}"]
    if failed or _exit_code(states):
        lines.append(f"the same command goes on, with what is not done alone: {sweep.command}")
    return [*lines, f"compare: ngpt report {folder}"]
