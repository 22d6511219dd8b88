"""`ngpt train -m`: one run per combination of values, all checked before the first starts. The same command continues a sweep."""

from collections.abc import Sequence
from pathlib import Path

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.durations import duration
from ngpt.shell import in_shell
from ngpt.sweeps import Sweep, write_sweep

from .devices import gpu_names
from .environment import current_world, unseen_gpus
from .many import DONE, FAILED, STOPPED, WAITING, Member, State, check_per_gpu, run_members
from .outcome import SIGNALLED_CODE
from .run_folder import locked
from .sweep_plan import Plan, Planned, check_members, is_done, plan_sweep, record
from .sweep_progress import Progress
from .sweep_status import glance, table
from .train import check_start

FAILURE = 1


def train_sweep(overrides: Sequence[str], config_dirs: Sequence[Path], command: Sequence[str], parallel: int, per_gpu: int = 1) -> int:
    """Trains every unfinished member, up to `parallel` at a time.

    Args:
        command: The command line, recorded with the sweep.
        parallel: How many members run at a time.
        per_gpu: How many members may share a GPU.

    Returns:
        0 if all are done; 1 if one has failed; 75 if a signal has ended members, and the same command continues them.

    Raises:
        ConfigError: any mistake that can be found before the first member starts.
    """
    if (world := current_world()) is not None:
        way_out = "Call it outside of one; ngpt launch -m makes a sweep an array of jobs"
        raise ConfigError("-m", f"in a world of {world.started_by}", "A sweep starts the processes of its members itself", way_out)
    plan = plan_sweep(overrides, config_dirs)
    _check_parallel(plan, parallel, per_gpu)
    verified = set[str]()
    check_members(plan, lambda config: check_start(config, None, verified))
    with locked(plan.folder):
        sweep = record(plan, command)
        write_sweep(plan.folder, sweep)
        print("\n".join([*unseen_gpus(plan.members[0].config), *_announced(plan, parallel, per_gpu)]), flush=True)
        on_gpus = bool(gpu_names())
        progress = Progress(plan.folder, sweep, [member.point.name for member in plan.members])
        states = run_members([_member(member, on_gpus) for member in plan.members], parallel, progress, per_gpu=per_gpu)
    print("\n".join(_ended(plan, sweep, states)), flush=True)
    return _exit_code(states)


def _member(planned: Planned, on_gpus: bool) -> Member:
    gpus = planned.config.cluster.gpus_per_node if on_gpus else 0
    return Member(planned.point.name, planned.folder, planned.command, gpus, lambda: is_done(planned.config))


def _exit_code(states: Sequence[State]) -> int:
    if any(state.status in (STOPPED, WAITING) for state in states):
        return SIGNALLED_CODE
    return 0 if all(state.status == DONE for state in states) else FAILURE


def _check_parallel(plan: Plan, parallel: int, per_gpu: int) -> None:
    gpus, most = len(gpu_names()), max(member.config.cluster.gpus_per_node for member in plan.members)
    check_per_gpu(per_gpu, parallel, most)
    if gpus and parallel > 1 and parallel * most > gpus * per_gpu:
        share = f", for {per_gpu} members each (--per-gpu)" if per_gpu > 1 else ""
        rule = f"{parallel} members of {most} GPUs (cluster.gpus_per_node) need {parallel * most}, and {gpus} are visible{share}"
        raise ConfigError("--parallel", parallel, rule, f"Set --parallel {max(1, gpus * per_gpu // most)}")


def _announced(plan: Plan, parallel: int, per_gpu: int) -> list[str]:
    swept = " x ".join(f"{axis.key} ({len(axis.values)})" for axis in plan.axes)
    left = [member for member in plan.members if not is_done(member.config)]
    shared = f", up to {per_gpu} on a GPU" if per_gpu > 1 else ""
    at_a_time = f", {parallel} at a time{shared}" if parallel > 1 else ", one after another"
    done = f", {len(plan.members) - len(left)} done before" if len(left) < len(plan.members) else ""
    lines = [f"sweep {plan.folder}: {len(plan.members)} members, {swept}{at_a_time}{done}"]
    lines.append(f"  output of each: {plan.folder}/MEMBER/console.log; how far they are: ngpt status {in_shell(str(plan.folder))}")
    gpus_in_use = min(parallel, len(gpu_names())) if per_gpu > 1 else parallel  # for an estimate in which sharing a GPU gains nothing
    return [*lines, *_estimated([member.config for member in left], gpus_in_use)]


def _estimated(configs: Sequence[Config], parallel: int) -> list[str]:
    """The estimated time; [] if no GPU is named to estimate for."""
    if not configs or any(config.cluster.gpu is None for config in configs):
        return []
    from ngpt.estimate.report import estimate

    days = sum(estimate(config)["cost"]["days"] for config in configs) / min(parallel, len(configs))
    return [f"  by the estimate {duration(days * 86400)} in all"]


def _ended(plan: Plan, sweep: Sweep, states: Sequence[State]) -> list[str]:
    """The table, and what to do about members that have not finished."""
    rows = [(member.name, glance(plan.folder / member.name, member, launcher=False)) for member in sweep.members]
    folder = in_shell(str(plan.folder))
    lines = ["", *table(rows), ""]
    failed = [state for state in states if state.status == FAILED]
    for state in failed:
        lines += [f"{state.member.name} failed: {state.why}", f"  {in_shell('ngpt', *state.member.command)}"]
    if failed or _exit_code(states):
        lines.append(f"the same command goes on, with what is not done alone: {sweep.command}")
    return [*lines, f"compare: ngpt report {folder}"]
