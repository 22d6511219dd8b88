"""Signals that ask a run to save and leave. One thread waits for them, so that they arrive whatever the process is waiting for.

The launcher starts every process of a run with these signals blocked. They stay blocked in every thread, and in every process that a rank
forks or spawns (data loaders, checkpoint writers), so that a signal to all processes of a job ends none of them. One thread of each rank
waits for them. A signal that arrives before this thread starts is not lost: blocked signals stay pending.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Under nohup the end of the terminal is no reason to leave. The processes of a run inherit the ignored SIGHUP.
_HANGUP = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
STOP_SIGNALS = (signal.SIGTERM, *_HANGUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def block_stop_signals() -> set[int | signal.Signals]:
    """Blocks them in this thread and in what it starts from now on. Returns the signals that were blocked before."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Blocks them as `block_stop_signals` does until the block ends; those that came meanwhile are handled then."""
    before = block_stop_signals()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """Whether a signal has asked this rank to save and leave.

    Args:
        leave: called from the waiting thread with a signal that comes before training starts. It should end the process: there is
            nothing to save, and the rank may be waiting for others that never come.
    """

    def __init__(self, leave: Callable[[signal.Signals], None]):
        self.leave = leave
        self.signal: signal.Signals | None = None  # the first that came
        self._training = False
        self._lock = threading.RLock()
        self._process = os.getpid()

    def listen(self) -> None:
        """Starts the waiting thread. Call it from the main thread before any other thread starts."""
        block_stop_signals()
        # multiprocessing unblocks two of them in the thread that first makes a queue (resource_tracker.ensure_running): they arrive here.
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        threading.Thread(target=self._wait, name="stop signals", daemon=True).start()

    def training_starts(self) -> None:
        """From here on a request waits for the end of the step."""
        with self._lock:
            self._training = True

    def _wait(self) -> None:
        while True:
            self._take(signal.Signals(signal.sigwait(STOP_SIGNALS)))

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # forked processes go on
            self._take(signal.Signals(number))

    def _take(self, number: signal.Signals) -> None:
        with self._lock:
            if self.signal is not None:
                return  # asked already
            self.signal = number
            if not self._training:
                self.leave(number)
