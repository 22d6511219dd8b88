"""Runs worker processes: their output goes to the terminal and to a file, signals go to them, their failure comes back as one line."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import psutil

FORWARDED_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TORCHRUN, WORKER_MODULE = "torch.distributed.run", "launch.worker"
RANK_ROLE = "rank"  # torchrun writes [<role><local rank>]: before each line


def worker_command(worker_arguments: Sequence[str], processes: int, log_dir: Path) -> list[str]:
    """The command that starts `processes` workers on this machine: torchrun for several, the worker itself for one.

    Args:
        worker_arguments: Arguments of `launch.worker`.
        processes: Workers to start.
        log_dir: Where torchrun keeps one file for each worker and stream.
    """
    if processes == 1:
        return [sys.executable, "-m", WORKER_MODULE, *worker_arguments]
    torchrun = [sys.executable, "-m", TORCHRUN, "--standalone", "--nproc-per-node", str(processes)]
    torchrun += ["--role", RANK_ROLE, "--tee", "3", "--log-dir", str(log_dir)]
    return [*torchrun, "-m", WORKER_MODULE, *worker_arguments]


def run_and_tee(command: Sequence[str], environment: Mapping[str, str], log_path: Path | None, reporting_rank: int = 0) -> int:
    """Runs a command to its end and copies what it prints to stdout and, appended, to `log_path`.

    Args:
        command: What to run.
        environment: Its whole environment.
        log_path: None: stdout only.
        reporting_rank: The local rank that prints the progress; its lines lose torchrun's prefix.

    Returns:
        The exit code; 128 + n for a process ended by signal n.
    """
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
    # A session of its own: Ctrl-C reaches the workers once, through us.
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    with _signals_forwarded_to(process), log_path.open("ab", buffering=0) if log_path else nullcontext() as log:
        for text in _arriving(process.stdout, b"[%s%d]:" % (RANK_ROLE.encode(), reporting_rank)):
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
            if log:
                log.write(text)
        code = process.wait()
    return 128 - code if code < 0 else code


def _workers_of(process: subprocess.Popen) -> list[int]:
    """Process ids that a signal goes to: torchrun's workers, since torchrun itself takes a signal for a failure; else the process."""
    if process.poll() is not None:
        return []
    workers = psutil.Process(process.pid).children() if TORCHRUN in process.args else []
    return [worker.pid for worker in workers if WORKER_MODULE in worker.cmdline()] or [process.pid]


def _arriving(stream: BinaryIO, prefix: bytes) -> Iterator[bytes]:
    """What has been printed so far, at once (a progress line ends without a newline), without `prefix` at the start of lines."""
    pending = b""
    while chunk := stream.read1():
        *lines, pending = (pending + chunk).split(b"\n")
        yield from (line.removeprefix(prefix) + b"\n" for line in lines)
        if not pending.startswith(prefix[:1]):  # no prefix can follow: the start of a line is shown before its end arrives
            yield pending
            pending = b""
    yield pending.removeprefix(prefix)


@contextmanager
def _signals_forwarded_to(process: subprocess.Popen) -> Iterator[None]:
    """The first Ctrl-C asks the workers to save and leave, as SIGTERM does; another one interrupts them."""
    interrupted = False

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if number == signal.SIGINT and not interrupted:
            interrupted, number = True, signal.SIGTERM
        for pid in _workers_of(process):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
