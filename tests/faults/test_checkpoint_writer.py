"""The process that writes asynchronous checkpoints: killed, it ends the run with one line; signals to every process leave it alone."""

import signal

import psutil
import pytest
from runs import TWO_RANKS, Training, assert_same_run, finish, gone, start

ASYNC = "checkpoint.async_save=true"


def writers(training: Training) -> list[psutil.Process]:
    return [process for process in training.tree() if any("spawn_main" in word for word in process.cmdline())]


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A run on one rank that saves asynchronously, undisturbed."""
    folder = tmp_path_factory.mktemp("async_twin") / "run"
    finish(folder, ASYNC)
    return folder


MOMENTS = {
    "idle": ({"kind": "slow_step", "seconds": 0.5}, lambda training: training.newest_step == 3, 3),
    "first_save": (
        {"kind": "slow_save", "seconds": 600},
        lambda training: list(training.folder.glob("checkpoints/.saving/iter_*/*.distcp")),
        None,
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_writer_ends_the_run_with_one_line_and_publishes_nothing(tmp_path, twin, moment):
    fault, reached, published = MOMENTS[moment]
    training = start(tmp_path / "run", ASYNC, fault=fault)
    training.wait_for(reached)
    everybody = training.tree()
    training.send(signal.SIGKILL, writers(training))
    assert training.end() not in (0, 2, 75), training.text
    newest = f"the newest checkpoint is that of step {published}" if published else "there is no checkpoint yet"
    lines = [line for line in training.text.splitlines() if line.startswith("ngpt train failed: rank 0: ")]
    assert len(lines) == 1 and f"checkpoint writer of rank 0 died (signal 9, SIGKILL); {newest}" in lines[0], training.text
    assert gone(everybody) == [] and training.newest_step == published
    finish(tmp_path / "run", ASYNC)
    assert_same_run(tmp_path / "run", twin)


def test_a_writer_that_dies_on_one_rank_of_two_ends_both(tmp_path):
    training = start(tmp_path / "run", ASYNC, *TWO_RANKS, fault={"kind": "slow_save", "seconds": 600, "rank": 1})
    training.wait_for(lambda t: (t.folder / "checkpoints" / ".saving" / "iter_0000003" / "__1_0.distcp").exists())
    everybody = training.tree()
    of_rank_1 = [process for process in writers(training) if process.environ().get("RANK") == "1"]
    assert len(of_rank_1) == 1
    training.send(signal.SIGKILL, of_rank_1)
    assert training.end() not in (0, 2, 75), training.text
    assert "checkpoint writer of rank 1 died (signal 9, SIGKILL)" in training.text
    assert gone(everybody) == [] and training.newest_step is None


def test_sigterm_to_every_process_finishes_an_asynchronous_save(tmp_path, twin):
    training = start(tmp_path / "run", ASYNC, fault={"kind": "slow_step", "seconds": 0.3})
    training.wait_for_step(2)
    everybody = training.tree()
    assert len(writers(training)) == 1
    training.send(signal.SIGTERM, everybody)
    assert training.end() == 75, training.text
    assert gone(everybody) == [] and training.newest_step >= 2
    finish(tmp_path / "run", ASYNC)
    assert_same_run(tmp_path / "run", twin)


def test_a_save_starts_no_process_and_a_killed_trainer_leaves_none(tmp_path):
    training = start(tmp_path / "run", fault={"kind": "slow_step", "seconds": 0.3})
    training.wait_for(lambda t: t.newest_step == 3)
    everybody = training.tree()
    assert [process.cmdline() for process in everybody if "multiprocessing" in " ".join(process.cmdline())] == []
    training.send(signal.SIGKILL, training.ranks())
    assert training.end() == 128 + signal.SIGKILL, training.text
    assert gone(everybody) == []
