"""A run folder in which nothing was trained is taken over by a run of another model. One that has trained, or may live, is not."""

import time
from pathlib import Path

import pytest

from launch import train
from launch.outcome import Outcome, record_outcome
from launch.resumable import check_resumable, resume_notes
from launch.run_folder import locked_run, record_failure, record_launch
from launch.slurm.jobs import record_job
from launch.untrained import has_trained
from ngpt.config.compose import compose, load
from ngpt.config.errors import ConfigError
from ngpt.progress import write_json
from tests.unit.launch.test_run_folder import with_checkpoint

COMMAND = ["ngpt", "train"]
OTHER = "train.seq_length=16"


@pytest.fixture
def make_config(tmp_path):
    return lambda *overrides: compose(["experiment=ngpt_tiny", f"run.dir={tmp_path / 'run'}", *overrides])


@pytest.fixture
def failed(make_config):
    """The folder of a run that failed before its first step."""
    config = make_config()
    folder = record_launch(config, COMMAND, {}).parent
    (folder / "console.log").write_text("why it failed\n")
    (folder / "metrics.jsonl").touch()  # opened before the first step
    write_json(folder / "heartbeat/rank0.json", {"rank": 0, "time": time.time(), "step": 1})
    record_failure(folder, 0, ConfigError("train.seq_length", 1, "rule", "way out"), time.time())
    return folder


def is_taken_over(config, rank: int = 0) -> bool:
    try:
        check_resumable(config, rank)
    except ConfigError as refusal:
        assert "holds a run of another model (train.seq_length: 32 -> 16)" in str(refusal)
        return False
    return True


def test_it_is_taken_over_in_one_line_and_keeps_what_it_holds(make_config, failed):
    assert is_taken_over(make_config(OTHER)) and resume_notes(make_config()) == []
    (line,) = resume_notes(make_config(OTHER))
    what = "its last launch was of another model and trained nothing (train.seq_length: 32 -> 16)"
    assert line == f"note: {failed} is taken over: {what}. Its config is kept in launches/, its output in console.log"
    record_launch(make_config(OTHER), COMMAND, {})
    assert load(failed / "launches/001/config.yaml").train.seq_length == 32
    assert (failed / "console.log").read_text() == "why it failed\n"
    assert resume_notes(make_config(OTHER)) == []


def test_a_launch_that_a_signal_ended_during_start_up_has_trained_nothing(make_config, failed):
    record_outcome(failed, Outcome("signalled", signal="SIGTERM"))
    assert is_taken_over(make_config(OTHER))


def test_the_steps_of_the_checkpoint_that_a_failed_run_started_from_are_not_its_own(make_config, failed):
    write_json(failed / "summary.json", {"status": "failed", "steps": 4})
    assert is_taken_over(make_config(OTHER))


@pytest.mark.parametrize(
    "leave",
    [
        lambda folder, config: (folder / "metrics.jsonl").write_text('{"step": 1}\n'),
        lambda folder, config: with_checkpoint(config, 2),
        lambda folder, config: record_outcome(folder, Outcome("signalled", 3, saved=False)),
        lambda folder, config: (folder / "outcome.json").write_text("{"),
        lambda folder, config: write_json(folder / "summary.json", {"status": "finished", "steps": 4}),
    ],
    ids=["step", "checkpoint", "outcome", "damaged outcome", "summary"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_has_trained_is_refused(make_config, failed, leave, rank):
    leave(failed, make_config())
    assert not is_taken_over(make_config(OTHER), rank)


@pytest.mark.parametrize("whose", ["last launch", "this launch"])
def test_a_checkpoint_elsewhere_counts(make_config, failed, tmp_path, whose):
    elsewhere = f"checkpoint.dir={tmp_path / 'elsewhere'}"
    if whose == "last launch":
        record_launch(make_config(elsewhere), COMMAND, {})
    with_checkpoint(make_config(elsewhere), 2)
    assert not is_taken_over(make_config(OTHER, *([elsewhere] if whose == "this launch" else [])))


def test_a_folder_that_was_moved_has_its_checkpoints(make_config, failed, tmp_path):
    with_checkpoint(make_config(), 2)
    assert has_trained(failed.rename(tmp_path / "moved"))


def test_a_launch_that_lives_keeps_its_folder_and_ranks_of_a_world_are_not_in_each_other_s_way(make_config, failed):
    with locked_run(make_config()):
        assert not is_taken_over(make_config(OTHER)) and is_taken_over(make_config(OTHER), rank=1)
    assert is_taken_over(make_config(OTHER))


def test_a_config_that_cannot_be_read_may_hide_checkpoints(failed):
    assert not has_trained(failed)
    (failed / "config.yaml").write_text("train: {")
    assert has_trained(failed)


def test_without_locks_a_heartbeat_says_that_a_launch_lives(make_config, failed):
    (failed / "failure_rank0.json").unlink()
    assert not is_taken_over(make_config(OTHER))
    write_json(failed / "heartbeat/rank0.json", {"rank": 0, "time": time.time() - 3600})
    assert is_taken_over(make_config(OTHER))


def test_a_job_that_waits_keeps_its_folder_even_after_a_failure(make_config, failed, slurm):
    record_job(failed, "7", COMMAND)
    assert is_taken_over(make_config(OTHER))  # no such job any more
    slurm.set("7")
    assert not is_taken_over(make_config(OTHER))
    slurm.set("7", JobState="FAILED")
    slurm.answers(*[(1, "slurm_load_jobs error: Unable to contact slurm controller")] * 20)
    assert not is_taken_over(make_config(OTHER))


def test_ngpt_train_takes_it_over(make_config, failed, monkeypatch, capsys):
    def run(_command, _environment, console: Path, *_rest, **_more) -> int:
        with console.open("a") as log:
            log.write("trains\n")
        record_outcome(failed, Outcome("finished", 4))
        return 0

    monkeypatch.setattr(train, "run_and_tee", run)
    assert train.train_config(make_config(OTHER), COMMAND) == 0
    assert f"note: {failed} is taken over: " in capsys.readouterr().err
    log = (failed / "console.log").read_text()
    assert log.startswith("why it failed\n") and log.endswith("trains\n") and not (failed / "failure_rank0.json").exists()
    with pytest.raises(ConfigError, match="holds a run of another model"):
        train.train_config(make_config(), COMMAND)
