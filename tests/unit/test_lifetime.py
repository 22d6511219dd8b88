"""A process ends with the one that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHILD = "import os, time; from ngpt.lifetime import {names}; end_with_parent({parent}); {more}"
CHILD += "print(os.getpid(), flush=True); time.sleep(600)"


def started(more: str = "", names: str = "end_with_parent") -> tuple[subprocess.Popen, int]:
    """A parent process and the number of its child, which has called `end_with_parent`."""
    child = CHILD.format(names=names, parent="os.getppid()", more=more)
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return parent, int(parent.stdout.readline())


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_killed_parent_takes_its_child_with_it():
    parent, child = started()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while not gone(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone(child)


def test_a_child_that_outlives_its_parent_does():
    parent, child = started("outlive_parent(); ", "end_with_parent, outlive_parent")
    parent.kill()
    parent.wait()
    assert not gone(child)
    os.kill(child, signal.SIGKILL)


def test_a_parent_that_has_gone_before_ends_the_child_at_once():
    code = CHILD.format(names="end_with_parent", parent=2**22 + 1, more="")  # no process has this number
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and not done.stdout
