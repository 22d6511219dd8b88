"""`ngpt launch -m`: a sweep as one job array, with a task for each unfinished member; without a scheduler, as `ngpt train -m`."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.shell import in_shell
from ngpt.sweeps import write_sweep

from .environment import submission_environment
from .run_folder import locked
from .slurm import scheduler
from .slurm.jobs import queued, record_job
from .slurm.script import ARRAY_FILE, render_array, sbatch_options
from .submit import checked_script, record_job_launch, write_script
from .sweep import train_sweep
from .sweep_plan import Plan, Planned, check_members, is_done, plan_sweep, record


def launch_sweep(
    overrides: Sequence[str], config_dirs: Sequence[Path], command: Sequence[str], parallel: int | None, per_gpu: int, dry_run: bool
) -> int:
    """Submits the members that are not done and are neither waiting nor running.

    Args:
        command: The command line, recorded with the sweep.
        parallel: How many members run at a time; None: as many as the scheduler starts, or one without a scheduler.
        per_gpu: How many members may share a GPU, without a scheduler.
        dry_run: Only print what would be done.

    Returns:
        0 once the array is submitted, or the exit code of `ngpt train -m`.

    Raises:
        ConfigError: any mistake that can be found before the first job starts.
    """
    plan = plan_sweep(overrides, config_dirs)
    schedulers = {member.config.cluster.scheduler for member in plan.members}
    if schedulers == {"none"}:
        words = [word for word in command[2:] if word != "--dry-run"]
        if dry_run:
            print(f"# no scheduler; the same on this machine:\n{in_shell('ngpt', 'train', *words)}")
            return 0
        return train_sweep(overrides, config_dirs, command, parallel or 1, per_gpu)
    if per_gpu != 1:
        rule = "Each member is a job with GPUs of its own"
        raise ConfigError("--per-gpu", per_gpu, rule, "Leave it out, or use ngpt train -m inside of one job")
    check_alike({member.point.name: member.config for member in plan.members}, "Launch them as two sweeps, with a run.name each")
    scripts: dict[str, str] = {}

    def check(config: Config) -> None:
        scripts[config.run.dir] = checked_script(config)

    check_members(plan, check)
    busy = queued([member.folder for member in plan.members])
    left = [member for member in plan.members if not is_done(member.config) and member.folder not in busy]
    kept = f"{len(plan.members)} members, {len(plan.members) - len(left) - len(busy)} done, {len(busy)} waiting or running"
    if not left:
        print(f"sweep {plan.folder}: {kept}: nothing to submit")
        return 0
    folder, work_dir = plan.folder.absolute(), Path.cwd()
    script = render_array(left[0].config, plan.name, folder, [member.folder.absolute() for member in left], work_dir, parallel)
    if dry_run:
        print(f"{script}\n# --- what task 0 of {len(left)} runs\n{scripts[left[0].config.run.dir]}", end="")
        return 0
    job = _submit(plan, left, scripts, script, command)
    shown = in_shell(str(plan.folder))
    print(f"job {job}, {len(left)} tasks; sweep {folder}: {kept}\nwatch: ngpt status {shown}\nstop:  ngpt stop {shown}")
    return 0


def _submit(plan: Plan, left: Sequence[Planned], scripts: dict[str, str], script: str, command: Sequence[str]) -> str:
    with ExitStack() as stack:
        stack.enter_context(locked(plan.folder))
        for member in left:
            stack.enter_context(locked(member.folder))
        write_sweep(plan.folder, record(plan, command))
        for member in left:
            record_job_launch(member.config, ["ngpt", *member.command])
            write_script(member.folder, scripts[member.config.run.dir])
        path = plan.folder / ARRAY_FILE
        path.write_text(script, encoding="utf-8")
        job = scheduler.submit(path.absolute(), submission_environment())
        for index, member in enumerate(left):
            record_job(member.folder, f"{job}_{index}", command)
    return job


def check_alike(configs: Mapping[str, Config], way_out: str) -> None:
    """Checks that all runs ask for the same nodes, time and account, as the tasks of one array must.

    Args:
        configs: by the name of the run.
        way_out: what to do if they do not.

    Raises:
        ConfigError: a run asks for something else than the first, or for an array of its own.
    """
    first, asked = next((name, _asked(config)) for name, config in configs.items())
    for name, config in configs.items():
        own = next((option for option in config.cluster.sbatch if option.startswith("--array")), None)
        if own is not None:
            rule = "Many runs are an array itself, a task a run"
            raise ConfigError("cluster.sbatch", own, rule, "Leave it out; --parallel N limits the tasks that run at a time")
        if (others := _asked(config)) != asked:
            differs = ", ".join(sorted({*asked} ^ {*others}))
            rule = f"{name} asks for other resources than {first} ({differs}), and an array asks for one kind"
            raise ConfigError("cluster", config.cluster.name, rule, way_out)


def _asked(config: Config) -> list[str]:
    nameless = replace(config, run=replace(config.run, name=""))
    return [config.cluster.scheduler, *sbatch_options(nameless, Path(), Path())]
