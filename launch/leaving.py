"""What a stop signal does while no workers run: before they start it ends the command, after they end it ends the wait."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ngpt.stopping import STOP_SIGNALS

from .outcome import SIGNALLED, SIGNALLED_CODE, Outcome


@contextmanager
def signals_leave() -> Iterator[None]:
    """Inside this context, a stop signal ends the command with code 75 and one line, unless other code installs a handler."""

    def leave(number: signal.Signals) -> None:
        print(f"ngpt train {Outcome(SIGNALLED, signal=number.name).line}", file=sys.stderr)
        sys.exit(SIGNALLED_CODE)

    with _taken(leave):
        yield


@contextmanager
def signals_noted(noted: list[signal.Signals]) -> Iterator[None]:
    """Inside this context, a stop signal is only added to the list."""
    with _taken(noted.append):
        yield


@contextmanager
def _taken(take: Callable[[signal.Signals], None]) -> Iterator[None]:
    previous = {number: signal.signal(number, lambda number, _frame: take(signal.Signals(number))) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if handler is not None:  # None: it was not set from Python
                signal.signal(number, handler)
