"""Before there are workers, there is nothing to save: a signal ends the command."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from launch.outcome import SIGNALLED, SIGNALLED_CODE, Outcome
from ngpt.stopping import STOP_SIGNALS


@contextmanager
def signals_leave() -> Iterator[None]:
    """Within it, a stop signal ends the command with 75 and one line, unless somebody takes it meanwhile."""

    def leave(number: int, _frame: FrameType | None) -> None:
        print(f"ngpt train {Outcome(SIGNALLED, signal=signal.Signals(number).name).line}", file=sys.stderr)
        sys.exit(SIGNALLED_CODE)

    previous = {number: signal.signal(number, leave) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if handler is not None:  # it was not set from Python
                signal.signal(number, handler)
