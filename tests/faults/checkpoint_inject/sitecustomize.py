"""A fault at a file operation of every process that finds this on its path: CHECKPOINT_FAULT is ACTION EVENT COUNT PATTERN.

ACTION: kill (SIGKILL) or an errno's name, raised. EVENT: open (for writing), rename, rmtree, or fsync (half of the file is cut off first).
COUNT: which of the matching events, from 1. PATTERN: searched for in the path.
"""

import errno
import os
import re
import signal
import sys


def install(action: str, event: str, count: str, pattern: str) -> None:
    seen = 0

    def strike(path: str) -> None:
        nonlocal seen
        if re.search(pattern, path):
            seen += 1
            if seen == int(count):
                if action == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                number = getattr(errno, action)
                raise OSError(number, os.strerror(number), path)

    def audit(name: str, arguments: tuple) -> None:
        if name == "open" and event == "open" and isinstance(arguments[0], str) and isinstance(arguments[1], str) and "w" in arguments[1]:
            strike(arguments[0])
        elif name == f"os.{event}" and event == "rename":
            strike(os.fsdecode(arguments[1]))
        elif name == f"shutil.{event}":
            strike(os.fsdecode(arguments[0]))

    sys.addaudithook(audit)
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if event == "fsync":
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if action == "kill" and re.search(pattern, path) and os.path.isfile(path):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            strike(path)
        flush(descriptor)

    os.fsync = fsync


if "CHECKPOINT_FAULT" in os.environ:
    install(*os.environ["CHECKPOINT_FAULT"].split(" ", 3))
