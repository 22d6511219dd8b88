"""Runs worker processes: their output goes to the terminal and to a file, signals go to them, their exit code comes back."""

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
OPEN_LINE_SECONDS = 2.0  # a line that stays without an end for so long may be a prompt


def worker_command(worker_arguments: Sequence[str], processes: int, run_dir: Path) -> list[str]:
    """The command that starts `processes` workers on this machine: torch's agent for several, the worker itself for one.

    Args:
        worker_arguments: Arguments of `launch.worker`.
        processes: Workers to start.
        run_dir: Where the agent says which worker died.
    """
    parent = str(os.getpid())
    if processes == 1:
        return [sys.executable, "-m", WORKER_MODULE, parent, *worker_arguments]
    return [sys.executable, "-m", AGENT_MODULE, parent, str(processes), str(run_dir), *worker_arguments]


def prints_into(path: Path, stream: TextIO) -> bool:
    """Whether what this process writes to a stream goes to that file: then the file needs no copy of it."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except (OSError, ValueError):  # neither may be there
        return False


def run_and_tee(
    command: Sequence[str],
    environment: Mapping[str, str],
    log_path: Path | None,
    reporting_rank: int = 0,
    forwarded: list[signal.Signals] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> int:
    """Runs a command to its end and copies what it prints to stdout and, appended, to `log_path`.

    A reader that closes its end of stdout, or a disk without room for the log, ends the copying there, not the run.

    Args:
        command: What to run. It starts with the stop signals blocked (ngpt/stopping.py), in a session of its own.
        environment: Its whole environment.
        log_path: None: stdout only, as where stdout is that very file.
        reporting_rank: The local rank that prints the progress; its lines lose the agent's prefix.
        forwarded: Takes the signals that were passed on to the workers, in their order.
        meanwhile: Called several times a second while the command runs, between its lines. It must not wait.

    Returns:
        The exit code, also where a descendant still holds the output open; -n for a process ended by signal n; 130 after a second Ctrl-C,
        which kills the workers; 75 after a signal that came before there were any.
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
    """A stream that may fail: then it is given up with a note."""

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

    The second value tells the code to end with where that has killed it: a second Ctrl-C, or a signal before there are workers.
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
        if not pids and process.poll() is None:  # the agent has started none yet, and there is nothing to save
            early.append(number)
            process.kill()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    with stop_signals_blocked():  # inherited by the command; and a signal that comes now waits for the handler
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield process, lambda: SIGNALLED_CODE if early else INTERRUPTED if interrupts > 1 else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _workers_of(process: subprocess.Popen, is_agent: bool) -> list[int]:
    """Process ids that a signal goes to: the agent's workers, or the worker itself."""
    if process.poll() is not None:
        return []
    if not is_agent:
        return [process.pid]
    try:
        return [child.pid for child in psutil.Process(process.pid).children()]
    except psutil.Error:  # gone meanwhile
        return []


def _arriving(process: subprocess.Popen, meanwhile: Callable[[], None]) -> Iterator[bytes]:
    """What the process prints, at once, until it has ended: a descendant that outlives it may hold the pipe open for ever."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        silent_polls, in_line = 0, False
        while True:
            # What is said meanwhile must not stand within a line of which the end is about to arrive.
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
        if not pending.startswith(prefix[:1]):  # no prefix can follow: the start of a line is shown before its end arrives
            yield pending
            pending = b""
    yield pending.removeprefix(prefix)
