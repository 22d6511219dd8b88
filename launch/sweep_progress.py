"""What a sweep reports while it runs: a line for each start and end, progress lines now and then, and its record in sweep.json."""

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from ngpt.durations import duration
from ngpt.files import last_lines
from ngpt.sweeps import Sweep, write_sweep

from .many import BLOCKED, DONE, FAILED, RUNNING, STOPPED, WAITING, State
from .run_folder import CONSOLE_FILE
from .sweep_status import figures

PROGRESS_SECONDS = 30.0  # between two lines on a running member
RECORD_SECONDS = 10.0


class Progress:
    """Called with the states of all members after each change and every few seconds (`launch.many.run_members`).

    Args:
        folder: the sweep's folder. sweep: its record, which is kept up to date.
        names: the names of this launch's members, in order.
    """

    def __init__(self, folder: Path, sweep: Sweep, names: Sequence[str]):
        self.folder, self.sweep, self.names = folder, sweep, list(names)
        self.members = {member.name: member for member in sweep.members}
        self.statuses = dict.fromkeys(names, WAITING)
        self.said = dict.fromkeys(names, 0.0)
        self.lines = dict.fromkeys(names, "")  # the newest known progress line of each, from an earlier launch or already printed
        self.recorded = 0.0

    def __call__(self, states: Sequence[State]) -> None:
        now, changed = time.monotonic(), False
        for state in states:
            name = state.member.name
            if state.status != self.statuses[name]:
                self.statuses[name], self.said[name], changed = state.status, now, True
                self._record(state)
                self.lines[name] = _newest_step(state.member.folder)
                if state.seconds or state.status != DONE:  # members done before this launch may be many, and are only counted
                    self._say(state, _change(state, self.members[name].val_loss))
            elif state.status == RUNNING and now - self.said[name] > PROGRESS_SECONDS:
                self.said[name] = now
                if (line := _newest_step(state.member.folder)) != self.lines[name]:
                    self.lines[name] = line
                    self._say(state, line)
        if changed or now - self.recorded > RECORD_SECONDS:
            self.recorded = now
            for state in states:
                if state.status == RUNNING:
                    self._record(state)
            with suppress(OSError):  # on a full disk the members matter more, and report it themselves
                write_sweep(self.folder, self.sweep)

    def _record(self, state: State) -> None:
        member = self.members[state.member.name]
        if member.status != state.status:
            member.changed = datetime.now(UTC).isoformat(timespec="seconds")
        member.status, member.exit_code, member.why = state.status, state.exit_code, state.why
        member.step, member.val_loss = figures(state.member.folder)

    def _say(self, state: State, line: str) -> None:
        with suppress(OSError, ValueError):  # if nobody reads the output any more, the sweep goes on
            number = f"{self.names.index(state.member.name) + 1:>{len(str(len(self.names)))}}"
            print(f"[{number}/{len(self.names)}] {state.member.name}: {line}", flush=True)


def _change(state: State, val_loss: float | None) -> str:
    took, loss = duration(state.seconds), "" if val_loss is None else f", validation loss {val_loss:.4f}"
    return {
        RUNNING: f"starts{' on GPU ' + ','.join(state.gpus) if state.gpus else ''}",
        DONE: f"done in {took}{loss}",
        FAILED: f"failed after {took}: {state.why}",
        BLOCKED: f"not started: {state.why}",
        STOPPED: f"stopped after {took}; the same command continues it",
    }[state.status]


def _newest_step(folder: Path) -> str:
    """The last progress line of a run's output; empty if there is none."""
    return next((line for line in reversed(last_lines(folder / CONSOLE_FILE)) if line.startswith("step ")), "")
