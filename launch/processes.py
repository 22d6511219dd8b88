"""Runs worker processes: copies their output to the terminal and a file, forwards signals to them, and returns their exit code."""

import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO, TextIO

import psutil

from ngpt.stopping import STOP_SIGNALS, stop_signals_blocked
from ngpt.streams import abandon

from .agent import RANK_ROLE
from .outcome import SIGNALLED_CODE

AGENT_MODULE, WORKER_MODULE = f"{__package__}.agent", f"{__package__}.worker"
INTERRUPTED = 130
POLL_SECONDS = 0.2
OPEN_LINE_SECONDS = 2.0  # a line left unfinished for this long may be a prompt


def worker_command(worker_arguments: Sequence[str], processes: int, run_dir: Path) -> list[str]:
    """The command that starts `processes` workers on this machine: torch's agent for several, the worker itself for one.

    Args:
        worker_arguments: Arguments of `launch.worker`.
        processes: Workers to start.
        run_dir: Where the agent records which worker died.
    """
    parent = str(os.getpid())
    if processes == 1:
        return [sys.executable, "-m", WORKER_MODULE, parent, *worker_arguments]
    return [sys.executable, "-m", AGENT_MODULE, parent, str(processes), str(run_dir), *worker_arguments]


def prints_into(path: Path, stream: TextIO) -> bool:
    """Whether a stream of this process already writes to that file, which then needs no copy."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except (OSError, ValueError):  # the file or the stream may be missing
        return False


def run_and_tee(
    command: Sequence[str],
    environment: Mapping[str, str],
    log_path: Path | None,
    reporting_rank: int = 0,
    forwarded: list[signal.Signals] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> int:
    """Runs a command until it ends. Copies its output to stdout and appends it to `log_path`.

    If the reader closes stdout, or the disk has no room for the log, copying to that place stops; the run goes on.

    Args:
        command: What to run. It starts in its own session, with the stop signals blocked (ngpt/stopping.py).
        environment: Its whole environment.
        log_path: None: stdout only, for instance because stdout already is that file.
        reporting_rank: The local rank that prints the progress; the agent's prefix is removed from its lines.
        forwarded: Receives the signals that were passed on to the workers, in order.
        meanwhile: Called several times a second while the command runs, between its lines. It must not wait.

    Returns:
        The exit code, even if a descendant still holds the output open; -n for a process ended by signal n; 130 after a second Ctrl-C,
        which kills the workers; 75 after a signal that came before there were workers.
    """
    outputs = [_Output(sys.stdout.buffer, "the terminal")]
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        if not prints_into(log_path, sys.stdout):
            outputs.append(_Output(log_path.open("ab", buffering=0), str(log_path)))
    with _started(command, environment, [] if forwarded is None else forwarded) as (process, signalled):
        for text in _without_prefix(_arriving(process, meanwhile), b"[%s%d]:" % (RANK_ROLE.encode(), reporting_rank)):
            for output in outputs:
                output.write(text)
        code = process.wait()
    for output in outputs[1:]:
        output.close()
    return signalled() or code


class _Output:
    """A stream that may fail; on failure it prints a note and stops writing."""

    def __init__(self, stream: BinaryIO, name: str):
        self.stream: BinaryIO | None = stream
        self.name = name

    def write(self, text: bytes) -> None:
        if self.stream is None:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError) as error:
            abandon(self.stream)
            self.stream = None
            with suppress(OSError, ValueError):
                print(f"note: {self.name} takes no more output ({error}); the run goes on", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.stream is not None:
            with suppress(OSError):
                self.stream.close()


@contextmanager
def _started(
    command: Sequence[str], environment: Mapping[str, str], forwarded: list[signal.Signals]
) -> Iterator[tuple[subprocess.Popen, Callable[[], int | None]]]:
    """The running command, with stop signals forwarded to its workers.

    The second value returns the code to exit with if a signal has killed the command: a second Ctrl-C, or one before there are workers.
    """
    interrupts = 0
    early: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupts
        forwarded.append(signal.Signals(number))
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            number = signal.SIGKILL
        pids = _workers_of(process, AGENT_MODULE in command)
        if not pids and process.poll() is None:  # the agent has started no workers yet, so there is nothing to save
            early.append(number)
            process.kill()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    with stop_signals_blocked():  # the command inherits this; a signal that arrives now waits for the handler
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield process, lambda: SIGNALLED_CODE if early else INTERRUPTED if interrupts > 1 else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _workers_of(process: subprocess.Popen, is_agent: bool) -> list[int]:
    """Process ids that receive a signal: the agent's workers, or the worker itself."""
    if process.poll() is not None:
        return []
    if not is_agent:
        return [process.pid]
    try:
        return [child.pid for child in psutil.Process(process.pid).children()]
    except psutil.Error:  # it has ended meanwhile
        return []


def _arriving(process: subprocess.Popen, meanwhile: Callable[[], None]) -> Iterator[bytes]:
    """The process's output as it arrives, until the process ends: a descendant that outlives it may hold the pipe open forever."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        silent_polls, in_line = 0, False
        while True:
            # What `meanwhile` prints must not interrupt a line whose end is about to arrive.
            if not in_line or silent_polls * POLL_SECONDS >= OPEN_LINE_SECONDS:
                meanwhile()
            ended = process.poll() is not None
            if selector.select(0 if ended else POLL_SECONDS):
                if chunk := os.read(process.stdout.fileno(), 1 << 16):
                    silent_polls, in_line = 0, not chunk.endswith(b"\n")
                    yield chunk
                    continue
                return
            if ended:
                return
            silent_polls += 1


def _without_prefix(chunks: Iterator[bytes], prefix: bytes) -> Iterator[bytes]:
    """The same output without `prefix` at the start of lines; a progress line is passed on before it ends with a newline."""
    pending = b""
    for chunk in chunks:
        *lines, pending = (pending + chunk).split(b"\n")
        yield from (line.removeprefix(prefix) + b"\n" for line in lines)
        if not pending.startswith(prefix[:1]):  # no prefix can follow, so the start of the line is shown at once
            yield pending
            pending = b""
    yield pending.removeprefix(prefix)
