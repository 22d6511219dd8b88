"""A tracker can neither stop a run nor hold it up, and what is not installed is told before a run starts."""

import signal
import threading

import pytest

from ngpt.config import compose
from ngpt.stopping import STOP_SIGNALS
from ngpt.trackers import Trackers, base

CONFIG = compose(["experiment=ngpt_tiny"])


class Recording:
    """Remembers its calls, and fails or waits in the one that it is told to."""

    name = "Recording"
    fails_in: str | None = None
    waits_in: str | None = None

    def __init__(self, cfg):
        self.calls, self.released, self.abandoned = [], threading.Event(), 0
        type(self).made = self

    def _called(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name == self.fails_in:
            raise SystemExit(3) if name == "close" else OSError("disk full\nand more")
        if name == self.waits_in:
            self.released.wait()
            raise RuntimeError("let go")

    def open(self, start_step):
        self.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._called("open", start_step)
        return "look here"

    def log(self, step, figures):
        self._called("log", step, figures)

    def close(self, status):
        self._called("close", status)

    def abandon(self):
        self.abandoned += 1
        self.released.set()


def run(kind: type[Recording], *others: type[Recording], steps: int = 2) -> list[str]:
    """What a launch with these trackers says."""
    said: list[str] = []
    trackers = Trackers([kind, *others], CONFIG, said.append)
    trackers.open(5)
    for step in range(6, 6 + steps):
        trackers.log(step, {"train/loss": 1.0})
    trackers.close("finished")
    trackers.close("failed")
    return said


def test_calls_come_in_their_order_from_a_thread_that_hears_no_signal():
    assert run(Recording) == ["look here"]
    tracker = Recording.made
    assert tracker.calls == [("open", 5), ("log", 6, {"train/loss": 1.0}), ("log", 7, {"train/loss": 1.0}), ("close", "finished")]
    assert set(STOP_SIGNALS) <= tracker.blocked and tracker.abandoned == 0


@pytest.mark.parametrize(("call", "words"), [("open", "OSError: disk full"), ("log", "OSError: disk full"), ("close", "SystemExit: 3")])
def test_one_that_fails_is_given_up_with_one_note_and_the_others_go_on(call, words):
    class Failing(Recording):
        name, fails_in = "Failing", call

    said = run(Failing, Recording)
    notes = [line for line in said if line.startswith("note: ")]
    assert notes == [f"note: Failing takes no more figures ({words}); the run goes on, and metrics.jsonl has them"]
    assert Failing.made.abandoned == 1 and Failing.made.calls[-1][0] == call
    assert len(Recording.made.calls) == 4 and Recording.made.abandoned == 0


def test_one_that_cannot_be_made_is_told():
    class Broken(Recording):
        def __init__(self, cfg):
            raise ImportError("libxyz.so is missing")

    assert any("ImportError: libxyz.so is missing" in line for line in run(Broken, Recording))
    assert len(Recording.made.calls) == 4


@pytest.mark.parametrize("call", ["open", "log", "close"])
def test_one_that_hangs_is_waited_for_a_while(call, monkeypatch):
    monkeypatch.setattr(base, "CLOSE_SECONDS", 0.2)

    class Hanging(Recording):
        name, waits_in = "Hanging", call

    said = run(Hanging)
    assert [line for line in said if "Hanging takes no more figures (not done" in line] and Hanging.made.abandoned == 1
    assert len([line for line in said if line.startswith("note: ")]) == 1


def test_one_that_falls_far_behind_is_given_up_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(base, "PENDING_CALLS", 10)

    class Slow(Recording):
        name, waits_in = "Slow", "open"

    said = run(Slow, steps=30)
    assert [line for line in said if "(10 figures behind)" in line]
    assert "log" not in {call[0] for call in Slow.made.calls}
