"""What a tracker is, and how a run gives it figures: from a thread of its own, so that no tracker can stop or hold up training."""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from ngpt.config.schema import Config
from ngpt.stopping import block_stop_signals

CLOSE_SECONDS = 20.0  # that a run waits for its trackers at its end; torchrun and SLURM allow it 30 s
ABANDON_SECONDS = 5.0
PENDING_CALLS = 10_000  # a tracker that falls behind by more will not catch up, and its figures would fill the memory


class Tracker(Protocol):
    """Takes the figures of one launch of a run. All calls but `abandon` come from one thread, in order.

    A call may raise: then the tracker is abandoned with a note, and the run goes on. A call may be slow: nobody waits before `close`.

    Attributes:
        name: for a person.
    """

    name: str

    def __init__(self, cfg: Config):
        """Imports the client. Called in the run's main thread, since two threads that import at once may see half a module."""

    def open(self, start_step: int) -> str | None:
        """Begins behind `start_step` (0 for a fresh run): what was shown of later steps is superseded.

        Returns:
            Where a person sees the figures, if that is worth a line.
        """

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes figures of one step, under names with groups (`figure_name`). They may be NaN or infinite; a step may come again."""

    def close(self, status: str) -> None:
        """The launch is over.

        Args:
            status: finished | stopped (train.stop_after reached) | signalled (a signal asked for it, the run goes on later) | failed.
        """

    def abandon(self) -> None:
        """Ends at once whatever a call waits for. Leaves nothing behind that could hold up the end of the process. Raises nothing.

        Called from another thread where `close` takes too long, and after a call has raised.
        """


class Trackers:
    """The trackers of a launch. Nothing here raises, and nothing but `close` waits.

    Args:
        kinds: of trackers.
        say: prints a line for a person.
    """

    def __init__(self, kinds: Sequence[type[Tracker]], cfg: Config, say: Callable[[str], None]):
        self._running: list[_Background] = []
        for kind in kinds:
            try:
                self._running.append(_Background(kind(cfg), say))
            except Exception as error:
                say(_given_up(kind.name, error))

    def __bool__(self) -> bool:
        return bool(self._running)

    def open(self, start_step: int) -> None:
        for tracker in self._running:
            tracker.open(start_step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for tracker in self._running:
            tracker.log(step, figures)

    def close(self, status: str) -> None:
        """Waits until all have everything, CLOSE_SECONDS at most. A second call does nothing."""
        closing, self._running = self._running, []
        for tracker in closing:
            tracker.close(status)
        deadline = time.monotonic() + CLOSE_SECONDS
        for tracker in closing:
            tracker.wait(deadline)


class _Background:
    """One tracker, and the thread that calls it."""

    def __init__(self, tracker: Tracker, say: Callable[[str], None]):
        self.tracker, self.say = tracker, say
        self._calls: queue.SimpleQueue[Callable[[], str | None] | None] = queue.SimpleQueue()
        self._given_up = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker: {tracker.name}")

    def open(self, start_step: int) -> None:
        self._thread.start()
        self._calls.put(partial(self.tracker.open, start_step))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if self._given_up:
            return
        if self._calls.qsize() >= PENDING_CALLS:
            self._give_up(f"{PENDING_CALLS} figures behind")
            return
        self._calls.put(partial(self.tracker.log, step, figures))

    def close(self, status: str) -> None:
        self._calls.put(partial(self.tracker.close, status))
        self._calls.put(None)

    def wait(self, deadline: float) -> None:
        """Waits until all calls have returned. At `deadline` (time.monotonic) the current one is abandoned."""
        if self._thread.ident is None:  # never opened
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._give_up(f"not done {CLOSE_SECONDS:g} s after the end of the run")
            self._thread.join(ABANDON_SECONDS)

    def _work(self) -> None:
        block_stop_signals()  # what a client starts inherits it: a signal to every process of a job is the run's, not the client's
        while (call := self._calls.get()) is not None:
            if self._given_up:
                continue
            try:
                line = call()
            except BaseException as error:  # clients also call sys.exit
                self._give_up(error)
            else:
                if line is not None:
                    self.say(line)

    def _give_up(self, why: BaseException | str) -> None:
        """Called by the thread, or on its behalf while it waits: then its call raises, too."""
        with self._lock:
            first, self._given_up = not self._given_up, True
        if first:
            self.say(_given_up(self.tracker.name, why))
            self.tracker.abandon()


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).strip().partition('\n')[0].split())}"


def _given_up(name: str, why: BaseException | str) -> str:
    words = why if isinstance(why, str) else first_line(why)
    return f"note: {name} takes no more figures ({words}); the run goes on, and metrics.jsonl has them"
