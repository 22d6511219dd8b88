"""Processes that end with their parent, whatever ends it. On Linux the kernel sends the signal, so none of our code has to run."""

import ctypes
import os
import signal
import sys
import threading
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent_pid: int | None = None) -> None:
    """Has the kernel kill this process when its parent ends. Outside Linux, processes of `multiprocessing` watch for it.

    The kernel takes the thread that started this process as its parent, so that thread must live as long as its own process: start
    from the main thread. Children do not inherit the setting; it survives `exec`.

    Args:
        parent_pid: The process that started this one. If it is already gone, this process ends at once. None: not checked.
    """
    if not _set_parent_death_signal(signal.SIGKILL):
        if (parent := parent_process()) is not None:
            threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
        return
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)


def outlive_parent() -> None:
    """Undoes `end_with_parent`."""
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
