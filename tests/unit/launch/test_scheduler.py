"""A controller that is away for a moment is asked again; an answer is an answer. The messages are those of SLURM 22.05."""

import pytest

from launch.slurm import scheduler

AWAY = [
    (1, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"),
    (1, "Unexpected message received for job 7"),  # of `scontrol requeue`
    (1, "slurm_load_jobs error: Socket timed out on send/recv operation"),
]


@pytest.fixture(autouse=True)
def soon(slurm, monkeypatch):
    slurm.set("7", JobState="RUNNING", Restarts=3)
    monkeypatch.setattr(scheduler, "PAUSES", (0,) * len(scheduler.PAUSES))


@pytest.mark.parametrize("answer", AWAY, ids=lambda answer: answer[1])
def test_a_controller_that_comes_back_is_asked_again(slurm, answer):
    slurm.answers(answer, answer)
    assert scheduler.requeue("7") is None and slurm.of("7", "requeued") and slurm.asked == 3


def test_one_that_stays_away_is_told(slurm, monkeypatch):
    monkeypatch.setattr(scheduler, "SECONDS", 0.05)
    slurm.takes(5)
    assert scheduler.requeue("7") == "scontrol does not answer"
    assert slurm.of("7", "requeued") is None


def test_a_refusal_is_not_repeated(slurm):
    slurm.answers((1, "Requested operation is presently disabled for job 7"))
    assert scheduler.requeue("7") == "Requested operation is presently disabled for job 7" and slurm.asked == 1


def test_a_machine_without_slurm_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert scheduler.requeue("7") == "scontrol is not installed here"


def test_the_state_of_a_job_is_what_slurm_shows(slurm):
    assert scheduler.job_state("7") == scheduler.JobState("RUNNING", "None", 3, preempted=False)
    slurm.set("7", JobState="COMPLETING", Reason="TimeLimit", Restarts=0, PreemptTime="2026-11-29T11:49:31")
    assert scheduler.job_state("7") == scheduler.JobState("COMPLETING", "TimeLimit", 0, preempted=True)
    assert scheduler.job_state("8") is None


def test_the_queue_has_the_tasks_of_a_job_that_slurm_knows(slurm):
    slurm.set("7", JobState="PENDING", Reason="Resources", TimeLeft="4:59")
    told = {"job": "7", "state": "PENDING", "reason": "Resources", "elapsed": "0:00", "left": "4:59", "nodes": ""}
    assert scheduler.queue("7") == [told | {"start": "2026-11-29T11:48:51"}]
    assert scheduler.cancel("7") is None and scheduler.queue("7") == [] == scheduler.queue("8")
    slurm.answers(AWAY[0])
    with pytest.raises(scheduler.ConfigError, match="SLURM: slurm_load_jobs error: Unable to contact"):
        scheduler.queue("7")
