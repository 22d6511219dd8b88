"""`ngpt study --slurm`: which jobs wait for which, what is submitted again, and what is refused. SLURM itself: tests/slurm."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import cli, study, submit_study
from launch.many import DONE, State
from launch.slurm import scheduler, trunk
from launch.slurm.jobs import last_job
from ngpt.config.errors import ConfigError
from ngpt.study.results import FORMAT
from tests.unit.study.studies import HEAD, TAIL, planned, write_study

TEXT = (
    HEAD
    + """\
words: [experiment=ngpt_tiny, train.steps=8]
lists: {seed: [1, 2]}
arms:
  branch: {after: trunk}
  trunk: {until: 0.5}
analyses:
  ptq: {what: ptq, arms: [branch], options: [--tokens, "64"]}
"""
    + TAIL
)
STUDY = ["study", "mine", "--config-dir", "conf"]
SLURM = [*STUDY, "cluster.scheduler=slurm", "cluster.save_time_s=1", "--slurm"]
FOLDER = Path("runs/studies/mine_small")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path / "conf", TEXT)
    return tmp_path


def finish(*runs: str, status: str = "finished") -> None:
    for run in runs:
        (FOLDER / run).mkdir(parents=True, exist_ok=True)
        (FOLDER / run / "summary.json").write_text(json.dumps({"status": status}))


def options(script: str) -> set[str]:
    return set(re.findall(r"#SBATCH (\S+)", script))


def test_branches_wait_for_trunks_and_the_page_for_all(slurm, capsys):
    assert cli.main([*SLURM, "--parallel", "3"]) == 0
    runs, branches, page = (slurm.of(job, "script") for job in ("42", "43", "44"))
    assert "jobs 42 43 44: 4 runs, 0 finished, 0 waiting or running, 4 submitted\n" in (out := capsys.readouterr().out)
    assert "stop:  scancel 42 43 44" in out
    assert "--array=0-1%3" in options(runs) and "dependency" not in runs and "trunks=() " in runs
    assert {"--array=0-1%3", "--dependency=afterany:42"} <= options(branches)
    absolute = FOLDER.absolute()
    assert f"runs=({absolute}/branch/seed=1 {absolute}/branch/seed=2)" in branches
    assert f"trunks=({absolute}/trunk/seed=1 {absolute}/trunk/seed=2)" in branches
    assert {"--dependency=afterany:42:43", "--job-name=mine_small_page", "--nodes=1"} <= options(page)
    assert [last_job(FOLDER / name) for name in ("trunk/seed=2", "branch/seed=1", ".")] == ["42_1", "43_0", "44"]
    words = re.search(r"ngpt\.launch\.cli (study .*)", page)[1].split()
    read = cli.parser().read(words)
    assert (read.name, read.size, read.out, read.analyze, read.slurm, read.parallel) == ("mine", "small", FOLDER, True, False, 1)
    assert (FOLDER / "branch/seed=1/job.sbatch").exists() and "stop_after: 4" in (FOLDER / "trunk/seed=1/config.yaml").read_text()


def test_only_what_is_neither_finished_nor_queued_is_submitted_again(slurm, capsys, monkeypatch):
    assert cli.main(SLURM) == 0
    monkeypatch.setattr(submit_study, "queued", lambda folders: dict.fromkeys(folders, "running"))
    assert cli.main(SLURM) == 0 and slurm.jobs == ["42", "43", "44"]
    assert "0 finished, 4 waiting or running: nothing to submit\n" in capsys.readouterr().out

    finish("trunk/seed=1")
    busy = {FOLDER / "trunk/seed=2": "running"}
    monkeypatch.setattr(submit_study, "queued", lambda folders: {folder: busy[folder] for folder in folders if folder in busy})
    shutil.rmtree(FOLDER / "branch")
    (FOLDER / "trunk/seed=1/checkpoints").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.submit.check_resumable", lambda config: None)  # a stand-in of a trunk has no checkpoint
        assert cli.main(SLURM) == 0
    assert slurm.jobs == ["42", "43", "44", "45", "46"] and slurm.of("44", "JobState") == "CANCELLED"
    assert "--dependency=afterany:42" in options(slurm.of("45", "script"))
    assert "--dependency=afterany:42:45" in options(slurm.of("46", "script"))

    finish("trunk/seed=1", "trunk/seed=2", "branch/seed=1", "branch/seed=2")
    slurm.set("46", JobState="COMPLETED")
    assert cli.main(SLURM) == 0 and slurm.jobs[-1] == "47" and "dependency" not in slurm.of("47", "script")  # for the page alone
    slurm.set("47", JobState="COMPLETED")
    for one in planned(Path("conf"), text=TEXT).analyses:
        (FOLDER / one.file).parent.mkdir()
        (FOLDER / one.file).touch()
    show()
    assert cli.main(SLURM) == 0 and slurm.jobs[-1] == "47"


def test_branches_whose_trunk_is_gone_are_submitted_again_unless_they_have_a_job(slurm, monkeypatch):
    finish("branch/seed=1", "branch/seed=2")
    busy = {FOLDER / "branch/seed=2": "running"}
    monkeypatch.setattr(submit_study, "queued", lambda folders: {folder: busy[folder] for folder in folders if folder in busy})
    assert cli.main(SLURM) == 0
    absolute = FOLDER.absolute()
    assert f"runs=({absolute}/trunk/seed=1 {absolute}/trunk/seed=2)" in slurm.of("42", "script")
    assert f"runs=({absolute}/branch/seed=1)" in slurm.of("43", "script")
    assert [path.name for path in sorted((FOLDER / "branch").iterdir())] == ["seed=1", "seed=1.kept1", "seed=2"]


def show(missing: Sequence[str] = (), leaves_out: str = "") -> None:
    """Results and a page of all that is there."""
    runs = [{"name": run.name} for run in planned(Path("conf"), text=TEXT).runs if run.name != leaves_out]
    texts, objects = ("name", "size", "description", "command"), ("provenance", "study", "comparisons", "verdict")
    empty = dict.fromkeys(texts, "") | {part: {} for part in objects}
    (FOLDER / "results.json").write_text(json.dumps({"format": FORMAT, **empty, "runs": runs, "missing": [*missing]}))
    (FOLDER / "index.html").touch()


def test_a_page_is_whole_if_it_shows_all_runs_and_analyses_as_they_are_now():
    made = planned(Path("conf"), text=TEXT)
    study = SimpleNamespace(plan=made, shared=SimpleNamespace(folder=FOLDER))
    finish(*(run.name for run in made.runs))
    files = [FOLDER / one.file for one in made.analyses]
    for file in files:
        file.parent.mkdir()
        file.touch()
    assert not submit_study._is_whole(study)
    show()
    assert submit_study._is_whole(study)
    show(missing=["branch/seed=1: missing"])
    assert not submit_study._is_whole(study)
    show(leaves_out="branch/seed=1")
    assert not submit_study._is_whole(study)
    for newer in (FOLDER / "trunk/seed=1/summary.json", files[0], FOLDER / "results.json"):
        show()
        later = (FOLDER / "index.html").stat().st_mtime_ns + 1_000_000
        os.utime(newer, ns=(later, later))
        assert not submit_study._is_whole(study)
        earlier = later - 10**12
        os.utime(newer, ns=(earlier, earlier))
    show()
    files[0].unlink()
    assert not submit_study._is_whole(study)


def test_a_page_job_that_waits_is_cancelled_only_once_there_is_another(slurm, capsys, monkeypatch):
    assert cli.main(SLURM) == 0
    submit = scheduler.submit

    def refuses(script, environment):
        if script.name == submit_study.PAGE_FILE:
            raise ConfigError("sbatch", "no", "SLURM refuses the job", "Ask it again")
        return submit(script, environment)

    monkeypatch.setattr(scheduler, "submit", refuses)
    monkeypatch.setattr(submit_study, "queued", lambda folders: {})
    assert cli.main(SLURM) == 2 and "SLURM refuses the job" in capsys.readouterr().err
    assert slurm.of("44", "JobState") == "PENDING"


def test_the_start_of_a_branch_is_looked_at_where_its_trunk_is_finished(slurm, capsys):
    finish("trunk/seed=1", status="stopped")  # and its checkpoint was removed
    assert cli.main(SLURM) == 2
    assert "branch/seed=1: checkpoint.load: runs/studies/mine_small/trunk/seed=1/checkpoints" in capsys.readouterr().err
    assert slurm.jobs == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*STUDY, "--slurm"], "--slurm: cluster=local. Runs become jobs, and branch/seed=1 has cluster.scheduler=none"),
        ([*SLURM, 'cluster.sbatch=["--array=1-2"]'], "cluster.sbatch: --array=1-2. Many runs are an array itself"),
        ([*SLURM, "--analyze"], "--slurm: with another option"),
        ([*SLURM, "--per-gpu", "2"], "--slurm: with another option"),
        ([*SLURM, "--parallel", "0"], "--parallel: 0. Is a number of runs"),
        ([*STUDY, "cluster.nodes=2"], "cluster.nodes: 2. A study runs on this machine. Choose a cluster of one host, or submit it"),
    ],
)
def test_what_cannot_be_an_array_ends_in_one_line(words, told, slurm, capsys):
    assert cli.main(words) == 2
    assert told in capsys.readouterr().err and slurm.jobs == [] and not FOLDER.exists()


def test_a_branch_starts_only_with_a_finished_trunk(workplace, slurm):
    """The script of the array, without SLURM: the job of the branch is a line that says it has begun."""
    assert cli.main(SLURM) == 0
    for seed in (1, 2):
        (FOLDER / f"branch/seed={seed}/job.sbatch").write_text("echo begun\n")
    finish("trunk/seed=2", status="stopped")
    for task, code, told in (("0", 2, "not started: its trunk"), ("1", 0, "begun")):
        (workplace / "task.sbatch").write_text(slurm.of("43", "script"))
        place = {"PATH": "/usr/bin:/bin", "SLURM_ARRAY_JOB_ID": "43", "SLURM_ARRAY_TASK_ID": task}
        done = subprocess.run(["bash", "task.sbatch"], env=place, check=False)
        run = FOLDER / f"branch/seed={int(task) + 1}"
        assert (done.returncode, told in (run / f"slurm-43_{task}.out").read_text()) == (code, True)
    assert "begun" not in (FOLDER / "branch/seed=1/slurm-43_0.out").read_text()
    assert trunk.main([str(FOLDER / "trunk/seed=1"), str(FOLDER / "branch/seed=1")]) == 2
    assert (FOLDER / "branch/seed=1/slurm.log").read_text().count("is not finished; ngpt study --slurm submits what is missing\n") == 2


def test_finished_runs_are_analysed_and_nothing_is_trained(monkeypatch):
    asked = []

    def run_members(members, parallel, report, per_gpu):
        asked.extend(member for member in members if not member.is_done())
        return [State(member, DONE) for member in members]

    monkeypatch.setattr(study, "run_members", run_members)
    monkeypatch.setattr("ngpt.study.page.write_page", lambda results, folder: folder / "index.html")
    finish("trunk/seed=1", "branch/seed=2")
    assert cli.main([*STUDY, "cluster.nodes=2", "--analyze"]) == 0  # as in the job of the page, whatever the runs took
    assert [(member.command[0], member.after) for member in asked] == [("analyze", ())]
    assert asked[0].command[1] == str(FOLDER / "branch/seed=2")
    assert json.loads((FOLDER / "results.json").read_bytes())["missing"][0] == "branch/seed=1: missing"
