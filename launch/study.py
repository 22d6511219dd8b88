"""`ngpt study`: from a study's plan to finished runs, results and a page."""

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.config.study import descriptions, load_study
from ngpt.files import replacing
from ngpt.places import check_place
from ngpt.shell import in_shell
from ngpt.study.analyses import has_result
from ngpt.study.plan import Plan, PlannedAnalysis, differing, plan

from .devices import gpu_names
from .environment import unseen_gpus
from .many import BLOCKED, DONE, FAILED, STOPPED, WAITING, Member, State, check_per_gpu, run_members
from .outcome import SIGNALLED_CODE
from .provenance import SOURCE, git_state, versions
from .run_folder import SUMMARY_FILE
from .study_plan import PlannedConfig, checked, composed, digests, table, there
from .study_shared import WORDS_FILE, Shared, continued_another, digest_of, is_done, study_of, words_of

if TYPE_CHECKING:
    from ngpt.study.numbers import Numbers  # its package imports matplotlib

FAILURE = 1
ROOT = Path("runs/studies")
RESULTS_FILE = "results.json"


def run_study(options: argparse.Namespace) -> int:
    """Plans, runs and reports a study.

    Args:
        options: as launch/commands/study.py reads them.

    Returns:
        0, with --slurm once the jobs are submitted; 1 if a run failed; 75 if a signal stopped the study.

    Raises:
        ConfigError: any mistake that can be found before the first run starts.
    """
    _check_options(options)
    if options.report not in (None, Path()):
        return _report_of_file(options.report, options.out, options.name)
    planned = plan(options.name, load_study(options.name, options.config_dir), options.size, options.overrides)
    folder = options.out or ROOT / f"{planned.name}_{planned.size}"
    taken, notes = _taken(planned, folder, options)
    for note in notes:
        print(note, flush=True)
    if options.report is not None and not folder.is_dir() and not taken:
        rule = "No such folder: nothing of this study has run there"
        raise ConfigError("--report", folder, rule, "Run it first, or name its folder, --out DIR")
    if not options.plan:
        check_place("--out", folder)
    _check_folder(planned.without(taken), folder)
    code = 0
    if options.report is None:
        code = _train(planned.without(taken), folder, options)
        if options.plan or options.slurm:
            return code
    print(f"Page: {_write(planned, folder, taken, options)}")
    return code


def _check_options(options: argparse.Namespace) -> None:
    """Refuses options that do not go together.

    Raises:
        ConfigError: says which.
    """
    of_file = options.report not in (None, Path())
    if of_file and not options.report.exists():
        rule = "It was read as the JSON of --report, and there is no such file"
        raise ConfigError("--report", options.report, rule, "Give the results.json of a study; its name and words come before --report")
    if options.sources and (options.slurm or of_file):
        rule = "A run or page here takes runs from it; jobs and --report JSON do not"
        raise ConfigError("--from", "with --slurm or --report JSON", rule, "Leave it out; with --report alone it adds them to the page")
    if of_file:
        return
    if options.name is None:
        raise ConfigError("ngpt study", "No name", "It runs a study", "ngpt list studies shows them")
    if options.parallel is not None and options.parallel < 1:
        raise ConfigError("--parallel", options.parallel, "Is a number of runs", "Give 1 or more")
    if options.slurm and (options.analyze or options.report is not None or options.per_gpu != 1):
        way_out = "Leave out --analyze, --report and --per-gpu"
        raise ConfigError("--slurm", "with another option", "Runs become jobs with GPUs of their own, and so do analyses", way_out)


def _train(planned: Plan, folder: Path, options: argparse.Namespace) -> int:
    """Shows the plan, then runs or submits what is missing of it. With --plan it stops before that."""
    if not planned.runs:  # all are in the files of --from
        if options.plan:
            print("0 runs left to train")
        return 0
    configs = checked(planned, folder, options.config_dir, with_data=not options.plan, here=not (options.slurm or options.analyze))
    points = {name: one.config for name, one in configs.items()}
    shared = Shared(planned, folder, points, lambda run: composed(run, planned, folder, options.config_dir))
    outdated = [] if options.analyze else shared.outdated()
    places = {run.name: None if run.name in outdated else shared.place(run.name) for run in planned.runs}
    known = there(planned, configs, folder, places, outdated)
    print("\n".join([table(planned, configs), *(known if options.plan else known[-1:])]), flush=True)
    if options.plan:
        return 0
    if options.slurm:
        return _submit(planned, points, shared, options)
    check_per_gpu(options.per_gpu, options.parallel or 1, max(one.gpus for one in configs.values()))
    for note in unseen_gpus(next(iter(configs.values())).config):
        print(note, file=sys.stderr)
    return _run(planned, configs, shared, outdated, options)


def _taken(planned: Plan, folder: Path, options: argparse.Namespace) -> tuple[Mapping[str, "Numbers"], Sequence[str]]:
    """The numbers of runs from the files of --from, and lines about them. What is finished in the folder is not taken."""
    if not options.sources:
        return {}, []
    from ngpt.study.evidence import taken_from

    for path in options.sources:
        if path.resolve() == (folder / RESULTS_FILE).resolve():
            raise ConfigError("--from", path, "Is what this call writes, and would lose what it does not take", "Give a copy of it")
    here = {run.name for run in planned.runs if is_done(folder / run.name, planned.is_trunk(run))}
    return taken_from(options.sources, planned, here, options.report is None, digests(planned, folder, options.config_dir))


def _report_of_file(path: Path, out: Path | None, name: str | None) -> int:
    """Writes the page of a file beside it if it lies in a study's folder, or into `out`. `name`: the study that it must be of."""
    from jinja2 import UndefinedError

    from ngpt.study.page import write_page
    from ngpt.study.results import MALFORMED, damaged, read

    if out is None and path.name != RESULTS_FILE:
        rule = f"Only the page of a {RESULTS_FILE}, as in a study's folder, is written beside it"
        raise ConfigError("--report", path, rule, "Say where the page belongs, --out DIR")
    results = read(path)
    if name is not None and name != results["name"]:
        raise ConfigError("--report", path, f"It is of the study {results['name']}, and {name} was asked for", "Leave out the name")
    try:
        page = write_page(results, out or path.parent)
    except ConfigError:
        raise
    except (*MALFORMED, UndefinedError) as error:
        raise damaged(path, error) from error
    print(f"Page: {page}")
    return 0


def _run(planned: Plan, configs: Mapping[str, PlannedConfig], shared: Shared, outdated: Sequence[str], options: argparse.Namespace) -> int:
    """Runs what is missing, and prints what failed and how to repeat it."""
    _record_words(planned, shared.folder)
    shared.set_aside(outdated)
    members = list(_analysed(planned, shared) if options.analyze else _members(planned, configs, shared, options.config_dir))
    states = run_members(members, options.parallel or 1, _Progress(len(members)), per_gpu=options.per_gpu)
    failed = [state for state in states if state.status in (FAILED, BLOCKED)]
    for state in failed:
        print(f"{state.member.name} {state.status}: {state.why}\n  {state.member.folder / 'console.log'}", file=sys.stderr)
    if failed:
        print("The same command repeats what failed.", file=sys.stderr)
    if any(state.status in (STOPPED, WAITING) for state in states):
        print("Stopped. The same command goes on.", file=sys.stderr)
        return SIGNALLED_CODE
    return FAILURE if failed else 0


def _submit(planned: Plan, points: Mapping[str, Config], shared: Shared, options: argparse.Namespace) -> int:
    from .submit_study import Submission, check_cluster, submit_study

    check_cluster(points)
    _record_words(planned, shared.folder)
    more = [f"--config-dir={path}" for path in options.config_dir]
    words = ["study", planned.name, *planned.words, *more, "--size", planned.size, "--out", str(shared.folder)]
    page = [*words, "--analyze", "--parallel", str(next(iter(points.values())).cluster.gpus_per_node)]
    return submit_study(Submission(planned, shared, points, ["ngpt", *words, "--slurm"], page, options.config_dir, options.parallel))


def _members(planned: Plan, configs: Mapping[str, PlannedConfig], shared: Shared, config_dirs: Sequence[Path]) -> Iterator[Member]:
    """Runs and analyses as members, each analysis directly after its run."""
    more = [f"--config-dir={path}" for path in config_dirs]
    on_gpus = bool(gpu_names())
    for run in planned.runs:
        command = ("train", *run.located(shared.folder, planned.name), *more)
        gpus = configs[run.name].gpus if on_gpus else 0
        after, place = (run.after,) if run.after else (), shared.folder / run.name
        rule = f"It ended without error, and {place / SUMMARY_FILE} does not say that all its steps are trained"
        undone = f"{rule}. Remove the folder {place}: the same command trains the run again"
        yield Member(run.name, place, command, gpus, partial(shared.take, run.name), after, undone)
        yield from (_analysis(one, shared.folder, (run.name,)) for one in planned.analyses if one.run == run.name)


def _analysed(planned: Plan, shared: Shared) -> Iterator[Member]:
    """The analyses of the runs that are finished."""
    finished = {run.name for run in planned.runs if shared.take(run.name)}
    return (_analysis(one, shared.folder, ()) for one in planned.analyses if one.run in finished)


def _analysis(one: PlannedAnalysis, folder: Path, after: tuple[str, ...]) -> Member:
    path, gpus = folder / one.file, int(bool(gpu_names()))
    is_done, undone = partial(has_result, path), f"It wrote no result to {path}"
    return Member(one.file, folder / one.run / "analysis", tuple(one.command(folder)), gpus, is_done, after, undone)


def _check_folder(planned: Plan, folder: Path) -> None:
    """Refuses a folder of another study, or of runs that were made with other words.

    Raises:
        ConfigError: says which study it is of, or how the first such run differs.
    """
    way_out = "Give this one a folder of its own, --out DIR"
    if (other := study_of(folder)) not in (None, planned.name):
        raise ConfigError(str(folder), "Holds another study", f"Its runs are of {other}", way_out)
    known = words_of(folder)
    for run in planned.runs:
        changed = differing(known.get(run.name, run.words), run.words)
        if changed and (folder / run.name).exists():
            rule = f"{run.name} was started with other words: {' '.join(changed)}"
            raise ConfigError(str(folder), "Holds another study", rule, way_out)


def _record_words(planned: Plan, folder: Path) -> None:
    """Adds the words of runs to those in the folder, before the first run starts."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WORDS_FILE) as stream:
        words = words_of(folder) | {run.name: list(run.words) for run in planned.runs}
        stream.write((json.dumps(words, indent=1) + "\n").encode())


class _Progress:
    """Prints a line for each member that starts or ends."""

    def __init__(self, total: int) -> None:
        self.total, self.told = total, dict[str, str]()

    def __call__(self, states: list[State]) -> None:
        ended = sum(state.status in (DONE, FAILED, BLOCKED, STOPPED) for state in states)
        for state in states:
            if state.status != WAITING and self.told.get(state.member.name) != state.status:
                self.told[state.member.name] = state.status
                time = f" in {state.seconds:.0f} s" if state.status in (DONE, FAILED) and state.seconds else ""
                print(f"[{ended}/{self.total}] {state.member.name} {state.status}{time}", flush=True)


def _write(planned: Plan, folder: Path, taken: Mapping[str, "Numbers"], options: argparse.Namespace) -> Path:
    from ngpt.study.page import write_page
    from ngpt.study.results import gather, keep_lost, write

    description = descriptions(options.config_dir).get(planned.name, "")
    git, _ = git_state(SOURCE)
    shown = {key: git.get(key) for key in ("commit", "dirty")} if git else None
    provenance: dict[str, Any] = {"git": shown, "versions": versions(), "gpus": list(gpu_names())}
    more = [*(f"--config-dir={path}" for path in options.config_dir), *(f"--from={path}" for path in options.sources)]
    command = in_shell("ngpt", "study", planned.name, *planned.words, "--size", planned.size, *more)
    configs = {run.name: digest_of(folder / run.name) for run in planned.runs if run.name not in taken}
    results = gather(planned, folder, description, command, provenance, {**taken, **_outdated(planned, folder, taken)}, configs)
    folder.mkdir(parents=True, exist_ok=True)
    if note := keep_lost(folder / RESULTS_FILE, results, is_done):
        print(note, flush=True)
    write(results, folder / RESULTS_FILE)
    return write_page(results, folder)


def _outdated(planned: Plan, folder: Path, taken: Collection[str]) -> dict[str, "Numbers"]:
    """The branches in the folder that continued another trunk than the one there now: without numbers, since pairs have one start."""
    from ngpt.study.numbers import Numbers

    found = {}
    for run in planned.runs:
        trunk = None if run.after is None else folder / run.after
        if trunk and run.name not in taken and is_done(folder / run.name, trunk=False) and is_done(trunk, trunk=True):
            if continued_another(trunk, folder / run.name):
                found[run.name] = Numbers(run, "continued another trunk", "", {})
    for name in list(found)[:1]:
        rule = "continued another trunk than the one there now, and are left out"
        print(f"{len(found)} branches {rule}, the first is {name}: without --report and --analyze they are trained again", flush=True)
    return found
