"""Locks a folder that only one command at a time may write."""

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ngpt.config.errors import ConfigError

LOCK_FILE = ".lock"
LOOK_SECONDS = 1.0
_held: list[IO[str]] = []  # locks that end with this process


@contextmanager
def locked(folder: Path, key: str, rule: str, way_out: str, named: bool = True) -> Iterator[None]:
    """Holds an existing folder. On file systems without locks it holds nothing.

    The holder takes the lock alone, then shares it with the processes that it starts (`join_lock`). So the lock lives as long as any of
    them, however the holder ends.

    Args:
        key, rule, way_out: of the error; `{holder}` in the rule stands for who holds it.
        named: leaves a file in the folder that names the holder; otherwise the folder shows no trace.

    Raises:
        ConfigError: another process holds it.
    """
    file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644) if named else os.open(folder, os.O_RDONLY)
    try:
        _lock_alone(file)
        if named:
            os.truncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.pread(file, 200, 0).decode(errors="replace").strip() if named else ""
        os.close(file)
        raise ConfigError(key, str(folder), rule.format(holder=who or "another process"), way_out) from None
    except OSError:  # no locks here
        pass
    try:
        yield
    finally:
        os.close(file)


def join_lock(folder: Path) -> None:
    """Holds a folder together with the process that has locked it, to the end of this process. Processes that it forks do not hold it."""
    with suppress(OSError):  # no locks here, or a disk that this machine does not share with the holder
        file = (folder / LOCK_FILE).open("r", encoding="utf-8")
        _held.append(file)
        fcntl.flock(file, fcntl.LOCK_SH)  # immediate, except while `holder` takes a look


def _leave_to_parent() -> None:
    """A forked process lets go: a loader of data only reads, and outlives a killed rank by seconds."""
    while _held:
        _held.pop().close()  # the parent's lock stays: both share one open file


os.register_at_fork(after_in_child=_leave_to_parent)


def holder(folder: Path) -> dict[str, Any] | None:
    """The process that holds the folder now: {"pid", "host"}; None where nobody does."""
    with suppress(OSError), (folder / LOCK_FILE).open("r+", encoding="utf-8") as file:
        match = re.search(r"process (\d+) on (\S+)", file.read())
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return {"pid": int(match[1]), "host": match[2]} if match else {"pid": None, "host": None}
    return None


def _lock_alone(file: int) -> None:
    """Raises BlockingIOError where others hold it. `holder` takes it for a moment to look; that moment is waited for."""
    deadline = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_SECONDS / 10)
