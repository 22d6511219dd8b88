"""Processes that end with the one that started them, whatever ends it: the kernel sends the signal, nothing has to run for it."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent_pid: int | None = None) -> None:
    """Has the kernel kill this process when its parent ends. Does nothing on other systems than Linux.

    The parent is a thread: call it in a process that a thread started which lives as long as its process (the main thread). Children
    do not inherit it; the setting survives `exec`.

    Args:
        parent_pid: The process that started this one. Where it has gone before this call, this process ends at once; None: not checked.
    """
    if not _set_parent_death_signal(signal.SIGKILL):
        return
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)


def outlive_parent() -> None:
    """Takes `end_with_parent` back."""
    _set_parent_death_signal(0)


def _set_parent_death_signal(number: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "prctl(PR_SET_PDEATHSIG)")
    return True
