"""What a stop signal does while there are no workers: before them it ends the command, after them it ends the waiting."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ngpt.stopping import STOP_SIGNALS

from .outcome import SIGNALLED, SIGNALLED_CODE, Outcome


@contextmanager
def signals_leave() -> Iterator[None]:
    """Within it, a stop signal ends the command with 75 and one line, unless somebody takes it meanwhile."""

    def leave(number: signal.Signals) -> None:
        print(f"ngpt train {Outcome(SIGNALLED, signal=number.name).line}", file=sys.stderr)
        sys.exit(SIGNALLED_CODE)

    with _taken(leave):
        yield


@contextmanager
def signals_noted(noted: list[signal.Signals]) -> Iterator[None]:
    """Within it, a stop signal is added to the list, and nothing else happens."""
    with _taken(noted.append):
        yield


@contextmanager
def _taken(take: Callable[[signal.Signals], None]) -> Iterator[None]:
    previous = {number: signal.signal(number, lambda number, _frame: take(signal.Signals(number))) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if handler is not None:  # it was not set from Python
                signal.signal(number, handler)
