"""Who is a rank in an interactive allocation: the tasks of a step are, the shell at the terminal is not."""

import json
import os
import pty
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("tracking")

ROOT = Path(__file__).resolve().parents[2]
WHO = "from launch.environment import current_world; w = current_world(); print('WORLD', [w.rank, w.size] if w else 'null')"


@pytest.fixture
def in_shell(tmp_path, monkeypatch):
    """Runs a command at a terminal with a script as its shell: the script asks who it is, then has a step of two tasks ask."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = tmp_path / "shell"
    ask = f'{sys.executable} -c "{WHO}"'
    script.write_text(f"#!/bin/bash\n{ask}\n{ask} </dev/null\necho STEP\nsrun --ntasks=2 --overlap {ask}\n")
    script.chmod(0o755)
    monkeypatch.setenv("SHELL", str(script))  # what salloc opens

    def run(*command: str) -> tuple[list, list]:
        shown = _at_a_terminal([*command, *([str(script)] if command[0] == "srun" else [])])
        shell, _, step = shown.partition("STEP")
        return _worlds(shell), sorted(_worlds(step))

    return run


def _worlds(shown: str) -> list:
    return [json.loads(line.partition("WORLD ")[2]) for line in shown.splitlines() if "WORLD " in line]


def _at_a_terminal(command: list[str]) -> str:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], command)
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(terminal)
    os.waitpid(pid, 0)
    return shown.decode(errors="replace")


@pytest.mark.parametrize(
    "command",
    [
        ("salloc", "--nodes=1", "--ntasks=2"),  # the shell is SLURM's interactive step
        ("srun", "--nodes=1", "--ntasks=2", "--pty"),  # looks like rank 0 of 2
    ],
)
def test_a_shell_trains_by_itself_and_a_step_started_from_it_has_ranks(in_shell, command):
    shell, step = in_shell(*command)
    assert shell == [None, None]
    assert step == [[0, 2], [1, 2]]
