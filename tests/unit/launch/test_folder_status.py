"""`ngpt status` of a folder that holds runs, sweeps and studies."""

import json
import os
import time
from pathlib import Path

from launch import cli
from launch.folder_status import entries
from launch.outcome import Outcome, record_outcome
from launch.run_folder import locked, record_failure
from launch.slurm.jobs import record_job
from ngpt.sweeps import Sweep, SweptRun, write_sweep
from tests.unit.analysis.runs import record, write_run


def make(folder: Path) -> None:
    """A finished run, one that runs, one that failed before its first step, a sweep, a study in a folder of studies, and other folders."""
    record_outcome(write_run(folder / "done"), Outcome("finished", 100))
    write_run(folder / "going", [record(10)], config={"train": {"stop_after": 40}})
    record_failure(write_run(folder / "failed", []), 0, RuntimeError("no memory"), 1.0)
    record_outcome(write_run(folder / "swept/lr=1"), Outcome("finished", 100))
    members = [SweptRun("lr=1", {"optim.lr": "1"}, []), SweptRun("lr=2", {"optim.lr": "2"}, [])]
    write_sweep(folder / "swept", Sweep("swept", [], ["optim.lr"], "ngpt train -m optim.lr=1,2", members))
    record_outcome(write_run(folder / "studies/gap_smoke/a"), Outcome("finished", 100))
    (folder / "studies/gap_smoke/words.json").write_text('{"a": [], "b": []}')
    (folder / "raw/texts").mkdir(parents=True)
    for metrics in folder.rglob("metrics.jsonl"):
        os.utime(metrics, (time.time() - 7200, time.time() - 7200))


def test_each_is_a_line(tmp_path, capsys):
    make(tmp_path)
    with locked(tmp_path / "going"):
        found = entries(tmp_path)
        assert cli.main(["status", str(tmp_path)]) == 0
    shown = [(entry.name, entry.kind, entry.state, entry.step, entry.last_step) for entry in found]
    assert shown == [
        ("done", "run", "finished", 100, 100),
        ("failed", "run", "failed", None, 100),
        ("going", "run", "running", 10, 40),
        ("studies/gap_smoke", "study", "1 finished, 1 waiting", None, None),
        ("swept", "sweep", "1 done, 1 waiting", None, None),
    ]
    assert found[2].train_loss == record(10)["train_loss"] and all(7200 <= entry.age_s < 9000 for entry in found)
    heading, done, *_ = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0] == "name" and done.split()[:4] == ["done", "run", "100/100", f"{record(100)['train_loss']:.4f}"]
    assert done.endswith("finished")


def test_commands_that_take_one_run_name_one_of_a_sweep(tmp_path, capsys):
    make(tmp_path)
    for words in (["export", "--out", str(tmp_path / "out")], ["analyze", "--what", "snr"]):
        assert cli.main([words[0], str(tmp_path / "swept"), *words[1:]]) == 2
        assert f"It holds a sweep: name a run of it, for instance {tmp_path / 'swept/lr=1'}" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path / 'going'}, {tmp_path / 'swept'}" in capsys.readouterr().err


def test_damaged_records_are_told_and_hide_nothing_else(tmp_path, capsys):
    record_outcome(write_run(tmp_path / "a"), Outcome("finished", 100))
    for name, file in (("b", "sweep.json"), ("c", "words.json"), ("d", "config.yaml")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{")
    (write_run(tmp_path / "e") / "outcome.json").write_text("{")
    assert cli.main(["status", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["entries"]
    assert [entry["state"] for entry in found] == ["finished", "cannot be read", "cannot be read", "not running", "damaged outcome.json"]


def test_a_member_of_a_sweep_says_that_its_outcome_is_damaged(tmp_path, capsys):
    make(tmp_path)
    write_sweep(tmp_path / "swept", Sweep("swept", [], ["optim.lr"], "ngpt train -m", [SweptRun("lr=1", {}, [], status="running")]))
    (tmp_path / "swept/lr=1/outcome.json").write_text('{"status": "fini')
    assert cli.main(["status", str(tmp_path / "swept")]) == 0
    shown = capsys.readouterr().out
    assert "1 failed" in shown and f"{tmp_path}/swept/lr=1/outcome.json: Damaged, so that " in shown


def test_runs_of_a_study_that_wait_as_jobs_are_pending(tmp_path, slurm):
    make(tmp_path)
    study = tmp_path / "studies/gap_smoke"
    record_job(write_run(study / "b", []), "7", ["ngpt", "study"])
    slurm.set("7")
    (found,) = entries(tmp_path / "studies")
    assert (found.name, found.state) == ("gap_smoke", "1 finished, 1 pending")
    slurm.set("7", JobState="RUNNING")
    assert entries(tmp_path / "studies")[0].state == "1 finished, 1 running"


def test_trunks_of_a_study_are_finished_where_they_reached_their_last_step(tmp_path):
    make(tmp_path)
    study = tmp_path / "studies/gap_smoke"
    record_outcome(write_run(study / "b", config={"train": {"stop_after": 40}}), Outcome("stopped", 40))
    assert entries(tmp_path / "studies")[0].state == "2 finished"
    record_outcome(study / "b", Outcome("signalled", 20))
    assert entries(tmp_path / "studies")[0].state == "1 finished, 1 signalled"
    record_outcome(write_run(tmp_path / "alone", config={"train": {"stop_after": 40}}), Outcome("stopped", 40))
    assert entries(tmp_path)[0].state == "stopped"  # a run of its own can go on


def test_hidden_folders_and_those_removed_meanwhile_are_passed_over(tmp_path, monkeypatch):
    record_outcome(write_run(tmp_path / "done"), Outcome("finished", 100))
    write_run(tmp_path / ".done.partial")
    (tmp_path / "gone").mkdir()
    iterdir = Path.iterdir

    def vanishes(folder):
        if folder.name == "gone":
            folder.rmdir()
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", vanishes)
    assert [entry.name for entry in entries(tmp_path)] == ["done"]
    assert entries(tmp_path / "gone") == []


def test_a_folder_without_any_is_no_run(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    assert entries(tmp_path) == [] and cli.main(["status", str(tmp_path)]) == 2
    assert "Not a run. " in capsys.readouterr().err
    assert cli.main(["status", str(tmp_path / "nowhere")]) == 2
    assert "No such folder. " in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert cli.main(["status", str(tmp_path / "file")]) == 2
    assert "file: A file, not a folder. A run folder holds config.yaml. Give the folder of a run" in capsys.readouterr().err
