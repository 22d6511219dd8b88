"""`ngpt study --slurm`: a study as arrays of jobs, one for its trunks and whole runs, one for its branches, and a job for its page."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.study.plan import Plan, PlannedRun

from .environment import submission_environment
from .run_folder import SUMMARY_FILE, locked
from .slurm import scheduler
from .slurm.jobs import last_job, queued, record_job
from .slurm.script import render_array, render_study
from .study import RESULTS_FILE
from .study_shared import Shared
from .submit import checked_script, record_job_launch, write_script
from .submit_sweep import check_alike

RUNS_FILE, BRANCHES_FILE, PAGE_FILE = "runs.sbatch", "branches.sbatch", "page.sbatch"


@dataclass(frozen=True)
class _Job:
    """A run to submit. `script`: that of its own job, which a task of the array runs."""

    run: PlannedRun
    folder: Path
    config: Config
    script: str


@dataclass(frozen=True)
class Submission:
    """What is the same for all jobs of a study.

    Attributes:
        points: a config of each run, for what all runs ask for alike.
        command: the command line, recorded with the jobs.
        page: the words of `ngpt` that analyse the finished runs and write the page.
        config_dirs: the user's folders of config files.
        parallel: how many runs of an array run at a time; None: as many as SLURM starts.
    """

    plan: Plan
    shared: Shared
    points: Mapping[str, Config]
    command: Sequence[str]
    page: Sequence[str]
    config_dirs: Sequence[Path]
    parallel: int | None


def check_cluster(points: Mapping[str, Config]) -> None:
    """Checks that the runs of a study can be tasks of one array.

    Raises:
        ConfigError: a run is for no scheduler, or runs ask for different resources.
    """
    for name, config in points.items():
        if config.cluster.scheduler != "slurm":
            rule = f"Runs become jobs, and {name} has cluster.scheduler={config.cluster.scheduler}"
            raise ConfigError("--slurm", f"cluster={config.cluster.name}", rule, "Add cluster=slurm_h100, or a file of your own")
    check_alike(points, "Leave out what differs")


def submit_study(study: Submission) -> int:
    """Submits the runs that are neither finished nor waiting nor running, then the job that analyses them and writes the page.

    Branches wait until every trunk that still runs has ended. A branch whose trunk has failed then ends at once, and says so.

    Returns:
        0 once the jobs are submitted, or there is nothing to submit.

    Raises:
        ConfigError: any mistake that can be found before a job starts.
    """
    folder = study.shared.folder
    outdated = study.shared.outdated()
    queueing = queued([folder / name for name in outdated])
    study.shared.set_aside([name for name in outdated if folder / name not in queueing])
    runs = sorted(study.plan.runs, key=lambda run: run.after is not None)
    left = [run for run in runs if not study.shared.take(run.name)]
    busy = queued([folder / run.name for run in left])
    jobs = [_job(study, run) for run in left if folder / run.name not in busy]
    there = f"{len(runs)} runs, {len(runs) - len(left)} finished, {len(busy)} waiting or running"
    page = last_job(folder)
    waits = scheduler.queue(page) if page is not None else []
    if not jobs and (waits or (not left and _is_whole(study))):
        print(f"{folder}: {there}: nothing to submit")
        return 0
    ids = {job.partition("_")[0] for run in left if folder / run.name in busy and (job := last_job(folder / run.name))}
    with ExitStack() as stack:
        for one in jobs:
            stack.enter_context(locked(one.folder))
        if whole := [one for one in jobs if one.run.after is None]:
            ids.add(_submit_array(study, RUNS_FILE, whole, []))
        if branches := [one for one in jobs if one.run.after is not None]:
            ids.add(_submit_array(study, BRANCHES_FILE, branches, _unfinished_trunks(study, branches)))
        ids.add(_submit_page(study, sorted(ids)))
    if page is not None and waits and waits[0]["state"] == "PENDING":  # it waits for fewer runs than there are now
        scheduler.cancel(page)
    listed = " ".join(sorted(ids, key=int))
    print(f"jobs {listed}: {there}, {len(jobs)} submitted\nwatch: squeue --jobs {listed.replace(' ', ',')}\nstop:  scancel {listed}")
    return 0


def _is_whole(study: Submission) -> bool:
    """Whether the page shows every run and analysis of the study, as they are now."""
    from ngpt.study.results import read

    folder, plan = study.shared.folder, study.plan
    parts = [*(folder / run.name / SUMMARY_FILE for run in plan.runs), *(folder / one.file for one in plan.analyses)]
    try:
        results = read(folder / RESULTS_FILE)
        shown = {run["name"] for run in results["runs"]}
        read_at, made_at = ((folder / file).stat().st_mtime_ns for file in (RESULTS_FILE, "index.html"))
        is_new = max(part.stat().st_mtime_ns for part in parts) <= read_at <= made_at
    except (ConfigError, OSError, KeyError, TypeError):
        return False
    return is_new and not results["missing"] and shown >= {run.name for run in plan.runs}


def _job(study: Submission, run: PlannedRun) -> _Job:
    folder, config = study.shared.folder / run.name, study.shared.composed(run.name)
    begun = run.after is None or study.shared.place(run.after) is not None
    try:
        return _Job(run, folder, config, checked_script(config, start_is_there=begun))
    except ConfigError as error:
        raise ConfigError(f"{run.name}: {error.path}", error.got, error.rule, error.way_out) from error


def _unfinished_trunks(study: Submission, branches: Sequence[_Job]) -> list[str]:
    """The jobs of the trunks that these branches wait for."""
    trunks = {one.run.after for one in branches if one.run.after is not None and study.shared.place(one.run.after) is None}
    return sorted({job.partition("_")[0] for name in trunks if (job := last_job(study.shared.folder / name)) is not None})


def _submit_array(study: Submission, file: str, jobs: Sequence[_Job], after: Sequence[str]) -> str:
    """Submits runs as the tasks of an array that starts once the jobs `after` have ended. Returns its id."""
    folder = study.shared.folder
    for one in jobs:
        words = one.run.located(folder, study.plan.name)
        record_job_launch(one.config, ["ngpt", "train", *words, *(f"--config-dir={path}" for path in study.config_dirs)])
        write_script(one.folder, one.script)
    name = f"{study.plan.name}_{study.plan.size}"
    places = [one.folder.absolute() for one in jobs]
    trunks = [(folder / one.run.after).absolute() for one in jobs if one.run.after is not None]
    script = render_array(jobs[0].config, name, folder.absolute(), places, Path.cwd(), study.parallel, trunks, after)
    job = _submitted(folder / file, script)
    for index, one in enumerate(jobs):
        record_job(one.folder, f"{job}_{index}", study.command)
    return job


def _submit_page(study: Submission, after: Sequence[str]) -> str:
    folder = study.shared.folder
    config = next(iter(study.points.values()))
    name = f"{study.plan.name}_{study.plan.size}_page"
    job = _submitted(folder / PAGE_FILE, render_study(config, name, folder.absolute(), Path.cwd(), study.page, after))
    record_job(folder, job, study.command)
    return job


def _submitted(path: Path, script: str) -> str:
    path.write_text(script, encoding="utf-8")
    return scheduler.submit(path.absolute(), submission_environment())
