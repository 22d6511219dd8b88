"""Whether a job comes back: every way that its ranks can end."""

import json

import pytest

from launch.outcome import Outcome
from launch.slurm import after
from launch.slurm.after import Decision, decide, limit_restarts
from launch.slurm.scheduler import JobState
from launch.world import Job

JOB = Job("17", restarts=2)
RUNNING = JobState("RUNNING", "None", restarts=2, preempted=False)
ENDING = JobState("COMPLETING", "None", restarts=2, preempted=False)
OUT_OF_TIME = JobState("COMPLETING", "TimeLimit", restarts=2, preempted=False)
RESTARTED = JobState("COMPLETING", "None", restarts=3, preempted=False)
SAVED = Outcome("signalled", 5, "SIGTERM", saved=True)
STARTING = Outcome("signalled", None, "SIGTERM")
CRASH = {"rank": 3, "error": "RuntimeError", "message": "NaN", "cause": "rank 3: RuntimeError: NaN"}
MISTAKE = {
    "rank": 0,
    "error": "ConfigError",
    "mistake": True,
    "message": "data.train: gone",
    "cause": "rank 0: ConfigError: data.train: gone",
}


@pytest.mark.parametrize(
    ("code", "state", "outcome", "failure", "stop", "comes_back", "exit_code"),
    [
        (0, RUNNING, Outcome("finished", 9), None, False, False, 0),
        (143, OUT_OF_TIME, Outcome("stopped", 9), None, False, False, 0),  # the run had reached its end
        (0, RUNNING, None, None, False, False, 0),  # nothing was left to train
        (0, RUNNING, SAVED, None, False, True, 75),  # the warning
        (75, RUNNING, STARTING, None, False, True, 75),
        (0, None, SAVED, None, False, True, 75),  # SLURM does not answer: it is asked once more
        (0, RUNNING, SAVED, None, True, False, 75),  # ngpt stop
        (0, ENDING, SAVED, None, False, False, 75),  # scancel, and the ranks had the time to save
        (143, ENDING, None, None, False, False, 143),  # scancel
        (143, OUT_OF_TIME, None, None, False, True, 143),
        (143, OUT_OF_TIME, None, None, True, False, 143),
        (143, JobState("COMPLETING", "None", 2, preempted=True), None, None, False, True, 143),  # PreemptMode=CANCEL
        (0, RESTARTED, SAVED, None, False, False, 75),  # a preemption, a lost node: SLURM does it
        (0, JobState("PENDING", "BeginTime", 3, preempted=False), SAVED, None, False, False, 75),
        (0, RESTARTED, None, None, False, False, 143),  # srun may end with 0 where a node is lost
        (137, RUNNING, None, CRASH, False, True, 137),
        (1, RUNNING, None, None, False, True, 1),  # srun itself
        (143, RUNNING, STARTING, CRASH, False, True, 143),  # the others were told to leave by the one that failed
        (2, RUNNING, None, None, False, False, 2),
        (143, RUNNING, None, MISTAKE, False, False, 2),  # the others were killed
        (0, RUNNING, SAVED, MISTAKE, False, True, 75),  # all had saved: what a rank said on its way out does not count
    ],
)
def test_a_job_comes_back_when_it_should(code, state, outcome, failure, stop, comes_back, exit_code):
    decision = decide(code, state, JOB, outcome, failure, stop)
    assert (decision.requeue, decision.code) == (comes_back, exit_code)
    assert decision.line and "\n" not in decision.line


def test_a_preemption_is_no_failure_to_make_progress():
    assert not decide(0, JobState("RUNNING", "None", 2, preempted=True), JOB, SAVED, None, False).counts
    assert decide(0, RUNNING, JOB, SAVED, None, False).counts


def test_restarts_in_a_row_are_limited_and_a_newer_checkpoint_begins_a_new_row(tmp_path):
    crash = Decision("NaN", 1, requeue=True)

    def restarted(step):
        return limit_restarts(crash, tmp_path, step, limit=2).requeue

    assert [restarted(step) for step in (None, None, None)] == [True, True, False]
    assert [restarted(step) for step in (5, 5, 5)] == [True, True, False]
    assert [restarted(step) for step in (6, 7, 8, 8, 8)] == [True, True, True, True, False]
    assert "2 restarts in a row without a newer checkpoint" in limit_restarts(crash, tmp_path, 8, limit=2).line
    assert limit_restarts(Decision("preempted", 143, requeue=True, counts=False), tmp_path, 8, limit=2).requeue
    assert not limit_restarts(crash, tmp_path / "new", 8, limit=0).requeue


def test_a_restart_that_cannot_be_counted_is_not_made(tmp_path):
    decision = limit_restarts(Decision("NaN", 1, requeue=True), tmp_path / "absent", None, limit=3)
    assert not decision.requeue and "No such file or directory" in decision.line


def test_a_damaged_count_of_restarts_begins_again(tmp_path):
    (tmp_path / after.RESTARTS_FILE).write_text("[]")
    assert limit_restarts(Decision("NaN", 1, requeue=True), tmp_path, None, limit=1).requeue
    assert json.loads((tmp_path / after.RESTARTS_FILE).read_text()) == {"step": None, "restarts": 1}


@pytest.fixture
def job(slurm, monkeypatch):
    """This process is a task of an array, of which SLURM knows."""
    monkeypatch.setenv("SLURM_JOB_ID", "19")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    slurm.set("17_3", JobState="RUNNING", Restarts=2)
    return slurm


def test_a_task_of_an_array_asks_for_itself_and_the_reason_is_kept(job, tmp_path, capsys):
    job.set("17", JobState="RUNNING", Restarts=2)
    assert after.main([str(tmp_path), "--code", "1"]) == 1
    assert (job.of("17_3", "requeued"), job.of("17", "requeued")) == ("yes", None)
    assert "srun ended with exit code 1; starts again" in capsys.readouterr().out
    assert "job 17_3 (restart 2), newest checkpoint none: srun ended" in (tmp_path / after.LOG_FILE).read_text()


def test_a_job_that_slurm_ends_is_asked_for_when_its_time_was_over_and_else_left_alone(job, tmp_path):
    for fields, comes_back in (({"Reason": "TimeLimit"}, True), ({}, False), ({"Restarts": 3}, False)):
        job.set("17_3", **{"JobState": "COMPLETING", "Reason": "None", "Restarts": 2, "requeued": "no"} | fields)
        after.main([str(tmp_path), "--code", "143"])
        assert (job.of("17_3", "requeued") == "yes") == comes_back, fields


def test_a_requeue_that_slurm_refuses_is_told(job, tmp_path, capsys):
    job.answers((0, ""), (1, "Requested operation is presently disabled for job 17_3"))
    assert after.main([str(tmp_path), "--code", "1"]) == 1
    assert "could not be requeued: Requested operation is presently disabled" in capsys.readouterr().out


def test_sigterm_alone_decides_nothing(job, tmp_path):
    assert after.main([str(tmp_path), "--out-of-time"]) == 0
    assert job.of("17_3", "requeued") is None and not list(tmp_path.iterdir())
