"""The watchdog of one rank, driven by a clock of the test."""

import json
import sys
import threading

import pytest

from megatron_ext.training import watchdog
from megatron_ext.training.flight_recorder import oldest_open
from megatron_ext.training.watchdog import POLL_SECONDS, SLOW_FACTOR, Watchdog, stuck_at
from ngpt.progress import EVALUATION, FORWARD, SAVE, Progress, read_heartbeats, write_json

TIMEOUT = 60


class Rank:
    """A rank whose watchdog polls when the test says so."""

    def __init__(self, run_dir, timeout=TIMEOUT, world_size=1):
        self.now, self.ended = 1000.0, []
        self.progress = Progress()
        self.progress.mark(FORWARD, 6, 2)
        self.progress.steps = 5
        self.watchdog = Watchdog(self.progress, run_dir, 0, world_size, timeout, clock=lambda: self.now, end=self.ended.append)

    def wait(self, seconds):
        """Let the time pass, poll by poll."""
        for _ in range(int(seconds / POLL_SECONDS)):
            self.now += POLL_SECONDS
            self.watchdog.poll()
            if self.ended:
                return

    def jump(self, seconds):
        """The process was stopped, and goes on."""
        self.now += seconds
        self.watchdog.poll()


@pytest.fixture
def rank(tmp_path):
    return Rank(tmp_path)


def test_a_rank_without_progress_ends_and_says_where_it_was(rank, tmp_path):
    rank.wait(TIMEOUT - 1)
    assert rank.ended == []
    rank.wait(1)
    assert rank.ended == [1]
    record = json.loads((tmp_path / "failure_rank0.json").read_text())
    assert (record["kind"], record["step"], record["operation"], record["microbatch"]) == ("hang", 6, "forward", 2)
    assert record["message"].startswith("no progress for 60 s in forward of step 6, micro-batch 2")
    stacks = (tmp_path / "logs" / "hang_rank0.txt").read_text()
    assert record["message"] in stacks and "test_a_rank_without_progress_ends" in stacks


def test_a_mark_starts_the_wait_anew(rank):
    for _ in range(4):
        rank.wait(TIMEOUT - 1)
        rank.progress.mark(FORWARD, 6, 3)
    assert rank.ended == []


@pytest.mark.parametrize("operation", [SAVE, "load", "start-up"])
def test_a_long_save_load_or_start_is_no_hang(rank, operation):
    rank.progress.mark(operation)
    rank.wait(SLOW_FACTOR * TIMEOUT)  # the first look sees the mark
    assert rank.ended == []
    rank.wait(1)
    assert rank.ended == [1]


def test_a_first_step_may_compile_for_long(rank):
    rank.progress.steps = 0
    rank.wait(SLOW_FACTOR * TIMEOUT - 1)
    assert rank.ended == []


def test_an_evaluation_counts_by_micro_batch(rank):
    for _ in range(10):
        rank.progress.begin_pass(EVALUATION, 6)
        rank.wait(TIMEOUT - 1)
    assert rank.ended == []


def test_a_stopped_process_and_a_jumping_clock_are_no_hang(rank):
    for _ in range(10):
        rank.jump(86400)
    assert rank.ended == []
    rank.jump(-86400)
    assert rank.ended == []


def test_without_a_timeout_only_the_heartbeat_is_written(tmp_path):
    rank = Rank(tmp_path, timeout=None)
    rank.wait(10)
    assert rank.ended == []
    (beat,) = read_heartbeats(tmp_path)
    assert (beat["rank"], beat["step"], beat["operation"], beat["idle_s"] > 0) == (0, 6, "forward", True)


@pytest.mark.parametrize(("before", "ends"), [(False, True), (True, False)])
def test_a_rank_follows_another_that_gave_up_in_this_launch_alone(tmp_path, monkeypatch, before, ends):
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 20.0)
    other = {"rank": 1, "time": 5.0, "kind": "hang"}
    if before:
        write_json(tmp_path / "failure_rank1.json", other)
    rank = Rank(tmp_path, world_size=2)
    rank.wait(3)
    if not before:
        write_json(tmp_path / "failure_rank1.json", other)
    rank.wait(1)
    assert rank.ended == []  # it may be about to go on
    rank.wait(4)
    assert bool(rank.ended) == ends


def test_the_thread_beats_at_once_and_says_that_the_rank_has_ended(tmp_path):
    rank = Rank(tmp_path)
    rank.watchdog.start()
    assert read_heartbeats(tmp_path)[0]["operation"] == "forward"
    rank.watchdog.stop()
    assert read_heartbeats(tmp_path)[0]["operation"] == "end"


def test_the_innermost_line_of_our_code_is_named(rank):
    entered, leave = threading.Event(), threading.Event()

    def wait_elsewhere():
        entered.set()
        leave.wait(60)

    thread = threading.Thread(target=exec, args=("f()", {"f": wait_elsewhere, "__name__": "megatron.core.schedules"}))
    thread.start()
    entered.wait(60)
    line, waits = stuck_at(sys._current_frames()[thread.ident])
    leave.set()
    thread.join()
    assert (line, waits) == ("megatron/core/schedules.py:1", True)
    assert stuck_at(None) == ("outside of our code", False)


def test_the_oldest_collective_that_is_not_done_is_found():
    done = {"state": "completed", "collective_seq_id": 7, "profiling_name": "nccl:all_reduce"}
    waits = {"state": "started", "collective_seq_id": 8, "profiling_name": "nccl:reduce_scatter", "input_sizes": [[4]]}
    assert oldest_open([done, waits, waits | {"collective_seq_id": 9}])["number"] == 8
    assert oldest_open([done]) is None
