"""A controller that is away for a moment is asked again; an answer is an answer."""

import subprocess

import pytest

from launch.slurm import scheduler


@pytest.fixture
def answers(monkeypatch):
    """The answers to come, and how often was asked."""
    asked, given = [], []

    def run(command, environment=None):
        asked.append(command)
        return given.pop(0)

    monkeypatch.setattr(scheduler, "_run", run)
    monkeypatch.setattr(scheduler.time, "sleep", lambda seconds: None)
    return asked, given


def answer(code, stderr=""):
    return subprocess.CompletedProcess([], code, "", stderr)


def test_a_controller_that_comes_back_is_asked_again(answers):
    asked, given = answers
    given += [answer(1, "Unable to contact slurm controller (connect failure)"), answer(124, "scontrol does not answer"), answer(0)]
    assert scheduler.requeue("7") is None and len(asked) == 3


def test_one_that_stays_away_is_told(answers):
    asked, given = answers
    given += [answer(124, "scontrol does not answer")] * len(scheduler.PAUSES)
    assert scheduler.requeue("7") == "scontrol does not answer" and len(asked) == len(scheduler.PAUSES)


def test_a_refusal_is_not_repeated(answers):
    asked, given = answers
    given += [answer(1, "Requested operation is presently disabled")]
    assert scheduler.requeue("7") == "Requested operation is presently disabled" and len(asked) == 1
