"""Processes that end with the one that started them, whatever ends it. On Linux the kernel sends the signal, nothing has to run for it."""

import ctypes
import os
import signal
import sys
import threading
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent_pid: int | None = None) -> None:
    """Has the kernel kill this process when its parent ends. On other systems than Linux processes of `multiprocessing` watch for it.

    The parent is a thread: call it in a process that a thread started which lives as long as its process (the main thread). Children
    do not inherit it; the setting survives `exec`.

    Args:
        parent_pid: The process that started this one. Where it has gone before this call, this process ends at once; None: not checked.
    """
    if not _set_parent_death_signal(signal.SIGKILL):
        if (parent := parent_process()) is not None:
            threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
        return
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)


def outlive_parent() -> None:
    """Takes `end_with_parent` back."""
    _set_parent_death_signal(0)


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _set_parent_death_signal(number: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "prctl(PR_SET_PDEATHSIG)")
    return True
