"""`ngpt launch`: a run as a job of the cluster's scheduler; without a scheduler, as `ngpt train` on this machine."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ngpt.checkpoints import tracker
from ngpt.config.checkpoints import newest_step, newest_verified_step
from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.shell import in_shell

from .environment import overruled, recorded_variables, submission_environment, variable_origins
from .extras import check_extras
from .resumable import check_resumable, resume_notes
from .run_folder import locked, nothing_left, record_launch
from .slurm import scheduler
from .slurm.after import RESTARTS_FILE, STOP_FILE
from .slurm.jobs import last_job, record_job
from .slurm.script import OUTPUT_FILE, SCRIPT_FILE, render
from .unchecked import check_unchecked


def launch(overrides: Sequence[str], config_dirs: Sequence[Path], command: Sequence[str], dry_run: bool) -> int:
    """Submits a run as a job, or trains it here if its cluster has no scheduler.

    Args:
        command: The command line, recorded with the run.
        dry_run: Only print what would be done.

    Returns:
        0 once the job is submitted, or the exit code of `ngpt train`.

    Raises:
        ConfigError: any mistake that can be found before the job starts.
    """
    config = compose(overrides, config_dirs)
    if config.cluster.scheduler == "none":
        return _launch_here(config, command, dry_run)
    return _launch_job(config, command, dry_run)


def _launch_here(config: Config, command: Sequence[str], dry_run: bool) -> int:
    from .train import train_config

    if dry_run:
        words = [word for word in command[2:] if word != "--dry-run"]
        print(f"# cluster={config.cluster.name} has no scheduler; the same on this machine:\n{in_shell('ngpt', 'train', *words)}")
        return 0
    return train_config(config, command)


def _launch_job(config: Config, command: Sequence[str], dry_run: bool) -> int:
    run_dir = Path(config.run.dir).absolute()
    script = checked_script(config)
    for note in (*_estimated(config), *overruled(config), *resume_notes(config)):
        print(note, file=sys.stderr)
    if dry_run:
        print(script, end="")
        return 0
    if (done := nothing_left(config)) is not None and not _went_back(config):
        print(done)
        return 0
    refuse_second_job(run_dir)
    with locked(run_dir):
        record_job_launch(config, command)
        job = submit(run_dir, script, command)
    output = run_dir / OUTPUT_FILE.format(job=job)
    folder = in_shell(config.run.dir)
    print(f"job {job}, run folder {run_dir}\nwatch: ngpt status {folder}; tail -F {in_shell(str(output))}\nstop:  ngpt stop {folder}")
    return 0


def checked_script(config: Config, start_is_there: bool = True) -> str:
    """The script of a run's job, after every check that is possible before the job starts.

    Args:
        start_is_there: whether the checkpoint that it starts from exists; otherwise another job is still to make it.

    Raises:
        ConfigError: a check failed.
    """
    from .train import check_prepared

    check_unchecked(config)
    if start_is_there:
        check_resumable(config)
    if config.cluster.container_image is None:  # a container has its own packages
        check_extras(config)
    check_prepared(config)
    return render(config, Path(config.run.dir).absolute(), Path.cwd())


def record_job_launch(config: Config, command: Sequence[str]) -> None:
    """Records the launch in the run folder, where its ranks read the config."""
    record_launch(config, command, recorded_variables(submission_environment()), variable_origins(config, config.cluster.environment))


def submit(run_dir: Path, script: str, command: Sequence[str]) -> str:
    """Writes the job's script into the run folder and submits it.

    Returns:
        The job's id.
    """
    write_script(run_dir, script)
    job = scheduler.submit(run_dir / SCRIPT_FILE, submission_environment())
    record_job(run_dir, job, command)
    return job


def write_script(run_dir: Path, script: str) -> None:
    """Writes the job's script, and removes the stop file and the restart count that earlier jobs left."""
    (run_dir / SCRIPT_FILE).write_text(script, encoding="utf-8")
    for file in (STOP_FILE, RESTARTS_FILE):
        (run_dir / file).unlink(missing_ok=True)


def refuse_second_job(run_dir: Path) -> None:
    """Raises a `ConfigError` if a job of this run folder waits or runs: two would train in one folder."""
    job = last_job(run_dir)
    tasks = scheduler.queue(job) if job is not None else []
    if tasks:
        way_out = f"Wait for it, or stop it (ngpt stop {in_shell(str(run_dir))}); a run.name of its own makes another run"
        raise ConfigError("run.dir", str(run_dir), f"Its job {job} is {tasks[0]['state']}", way_out)


def _went_back(config: Config) -> bool:
    """Whether the last checkpoint of a run that seems finished is damaged. If so, points the tracker to the intact one before it.

    Before they start, a job's ranks look only at sizes, and would find nothing to do.

    Raises:
        ConfigError: no published checkpoint is intact.
    """
    if config.checkpoint.verify != "full":
        return False
    folder, step = Path(config.checkpoint.dir), newest_verified_step(config)
    if step is None or step == newest_step(config):
        return False
    tracker.replace(folder, tracker.stage(folder, step))
    print(f"note: the newest checkpoint is damaged; {tracker.TRACKER_FILE} names step {step} now", file=sys.stderr)
    return True


def _estimated(config: Config) -> list[str]:
    """The estimate's lines on whether the run fits and how long it takes; a warning if it does not fit."""
    from ngpt.estimate.layouts import check_for_gpus
    from ngpt.estimate.report import as_table, estimate

    if config.cluster.gpu is None:
        return []
    check_for_gpus(config)
    values = estimate(config)
    shown = [line for line in as_table(config, values).splitlines() if line.startswith(("run ", "memory a rank", "step ", "cost "))]
    if not values["memory"]["fits"]:
        shown.append("warning: by the estimate this does not fit; ngpt estimate --fit proposes layouts that do")
    return shown
