"""A hang ends the run and names the rank that is behind; what only takes long does not. A slow rank is named."""

import json
import signal
import time

from runs import STEPS, TWO_RANKS, finish, gone, last_row, start

from ngpt.progress import read_heartbeats

HANG_SECONDS = 15.0
WATCHED = (*TWO_RANKS, f"cluster.hang_timeout_s={HANG_SECONDS}")


def test_the_rank_that_hangs_is_named_with_its_step(tmp_path):
    training = start(tmp_path / "run", *WATCHED, fault={"kind": "hang", "step": 5, "rank": 1})
    assert training.end() not in (0, 2, 75), training.text
    last = training.text.strip().splitlines()[-2]
    assert last.startswith("ngpt train failed: hang: rank 1 has been in the beginning of step 5 for ")
    assert last.endswith("; rank 0 waited in the gradient reduction of step 5")
    stacks = (tmp_path / "run" / "logs" / "hang_rank1.txt").read_text()
    assert "injection/sitecustomize.py" in stacks and "in _act" in stacks
    finish(tmp_path / "run", *WATCHED)


def test_a_stopped_rank_is_named_by_its_heartbeat(tmp_path):
    training = start(tmp_path / "run", *WATCHED, fault={"kind": "slow_step", "seconds": 0.5})
    training.wait_for_step(2)
    waiting, stopped = training.ranks()
    training.send(signal.SIGSTOP, [stopped])
    training.wait_for(lambda t: gone([waiting], 0.1) == [])
    training.send(signal.SIGKILL, [stopped])  # a stopped process does not see that the agent asks it to end
    assert training.end() not in (0, 2, 75)
    assert "hang: rank 1 has not answered since " in training.text


def test_a_whole_run_that_was_stopped_goes_on(tmp_path):
    training = start(tmp_path / "run", *WATCHED, fault={"kind": "slow_step", "seconds": 0.2})
    training.wait_for_step(2)
    everybody = training.tree()
    training.send(signal.SIGSTOP, everybody)
    time.sleep(2 * HANG_SECONDS)  # the fault itself: it was stopped for longer than a hang may last
    training.send(signal.SIGCONT, everybody)
    assert training.end() == 0, training.text


def test_a_save_longer_than_the_limit_and_a_clock_set_back_are_no_hang(tmp_path):
    training = start(tmp_path / "run", *WATCHED, fault={"kind": "slow_save", "seconds": HANG_SECONDS / 4})
    assert training.end() == 0, training.text
    training = start(tmp_path / "back", *WATCHED, fault={"kind": "clock", "step": 4})
    assert training.end() == 0, training.text


def test_the_heartbeats_of_a_finished_run_say_so(tmp_path):
    finish(tmp_path / "run", *TWO_RANKS)
    beats = read_heartbeats(tmp_path / "run")
    assert [(beat["rank"], beat["operation"], beat["step"]) for beat in beats] == [(0, "end", STEPS), (1, "end", STEPS)]


def test_a_slow_rank_is_named_once_and_its_figures_are_kept(tmp_path):
    words = (*TWO_RANKS, "logging.health_interval=2", "logging.straggler_ratio=2")
    training = start(tmp_path / "run", *words, fault={"kind": "slow_micro_batch", "seconds": 1.0, "rank": 1})
    assert training.end() == 0, training.text
    assert training.text.count("rank 1 is slow: ") == 1 and "rank 0 is slow" not in training.text
    row = last_row(tmp_path / "run")
    assert row["slowest_rank"] == 1 and row["slowest_rank_ratio"] > 2
    assert json.dumps(row)
