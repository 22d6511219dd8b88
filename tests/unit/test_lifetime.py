"""A process that asked for it ends with its parent, also where the parent had gone before it could ask."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")

ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 60  # a process that stays behind ends here; no statement about speed

PARENT = """
    import os, signal, subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
    print(child.pid, child.stdout.readline().decode().strip(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run_parent(child: str) -> psutil.Process | None:
    """Runs `child` below a parent that is killed once the child has spoken; None where the child has ended."""
    text = f"CHILD = {textwrap.dedent(child)!r}\n" + textwrap.dedent(PARENT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", text], env=environment, stdout=subprocess.PIPE, text=True)
    pid, said = parent.stdout.readline().split()
    assert said == "ready" and parent.wait() == -signal.SIGKILL
    try:
        return psutil.Process(int(pid))
    except psutil.NoSuchProcess:
        return None


def test_a_child_ends_with_its_killed_parent():
    child = run_parent("""
        import os, time
        from ngpt.lifetime import end_with_parent
        end_with_parent(os.getppid())
        print("ready", flush=True)
        time.sleep(600)
    """)
    if child is not None:
        child.wait(timeout=END_SECONDS)


def test_a_child_that_takes_it_back_stays():
    child = run_parent("""
        import os, time
        from ngpt.lifetime import end_with_parent, outlive_parent
        end_with_parent(os.getppid())
        outlive_parent()
        print("ready", flush=True)
        time.sleep(600)
    """)
    assert child is not None and child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    child.kill()


def test_a_child_whose_parent_has_gone_already_ends_at_once():
    code = "import sys; from ngpt.lifetime import end_with_parent; end_with_parent(int(sys.argv[1])); print('still here')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    not_the_parent = psutil.Process().ppid() or 1
    done = subprocess.run([sys.executable, "-c", code, str(not_the_parent)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
