"""The launcher starts the workers again after a rollback, and after nothing else."""

import signal

import pytest

from launch import train
from launch.outcome import Outcome, record_outcome
from ngpt.config.compose import compose
from ngpt.rollbacks import record_rollback


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Runs the launcher with workers that end with the given codes; a rollback is recorded by those before the last where `rolls`."""
    run_dir = tmp_path / "run"

    def run(codes, rolls=True, signals=()):
        left = list(codes)

        def workers(*args, **kwargs):
            code = left.pop(0)
            kwargs["forwarded"].extend(signals)
            if rolls and left:
                record_rollback(run_dir, 14 + len(left), 10, "the loss is nan")
            if code == 0:
                record_outcome(run_dir, Outcome("finished", 20))
            return code

        monkeypatch.setattr(train, "run_and_tee", workers)
        monkeypatch.setattr(train, "OTHERS_SECONDS", 0.0)
        code = train._run_all_ranks(compose(["experiment=ngpt_tiny", f"run.dir={run_dir}"]), 2, {}, ["ngpt", "train"])
        return code, len(left)

    return run


def test_a_rollback_starts_the_workers_again(launched, capsys):
    assert launched([1, 1, 0]) == (0, 0)
    assert capsys.readouterr().err.count("ngpt train goes back to step 10: the loss is nan") == 2


def test_a_signal_during_a_rollback_ends_the_launch(launched, capsys):
    assert launched([1, 0], signals=[signal.SIGTERM, signal.SIGINT]) == (75, 1)
    assert "ended by SIGTERM after step 10, which is saved; the same command goes on" in capsys.readouterr().err


def test_another_failure_after_a_rollback_ends_the_launch(launched):
    assert launched([1, 1]) == (1, 0)
    assert launched([1, 0], rolls=False) == (1, 1)  # those of earlier launches are not followed again
