"""Copied output, exit codes and signals of worker processes; the workers are small stand-ins.

The commands that start real ones are run by test_cli.py (one worker) and tests/integration (several, under an agent).
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import pytest

from launch.processes import run_and_tee
from launch.train import exit_code

ROOT = Path(__file__).resolve().parents[3]


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_output_is_shown_and_appended_without_the_prefix_of_the_reporting_rank(tmp_path, capsysbinary):
    log = tmp_path / "console.log"
    log.write_text("earlier\n")
    code = "import sys; print('[rank1]:loss 1'); print('[rank0]:loss 2', file=sys.stderr); print('plain', end='')"
    assert run_and_tee(python(code), dict(os.environ), log, reporting_rank=1) == 0
    assert capsysbinary.readouterr().out == b"loss 1\n[rank0]:loss 2\nplain"
    assert log.read_bytes() == b"earlier\nloss 1\n[rank0]:loss 2\nplain"


def test_a_prefix_cut_in_two_by_the_pipe_is_still_removed_and_a_line_shown_before_it_ends(tmp_path):
    """The worker writes on only when what it wrote before has been passed on; it waits in vain for what is held back."""
    log = tmp_path / "console.log"
    code = (
        "import sys, time; from pathlib import Path\n"
        "def write(text, shown):\n"
        "    sys.stdout.write(text); sys.stdout.flush()\n"
        "    end = time.monotonic() + 20\n"
        f"    while Path({str(log)!r}).read_bytes() != shown:\n"
        "        time.sleep(0.002); assert time.monotonic() < end, shown\n"
        "write('a\\n[ra', b'a\\n')\n"
        "write('nk0]:b\\n', b'a\\nb\\n')\n"
        "write('step 1\\r', b'a\\nb\\nstep 1\\r')\n"
        "write('step 2\\r', b'a\\nb\\nstep 1\\rstep 2\\r')\n"
    )
    assert run_and_tee(python(code), dict(os.environ), log) == 0


def test_other_work_is_done_meanwhile(tmp_path):
    """The worker ends when the launcher has done it twice, also while there is nothing to copy."""
    done = tmp_path / "done"
    code = f"import time; from pathlib import Path\nwhile len(Path({str(done)!r}).read_text()) < 2: time.sleep(0.01)"
    done.touch()

    def work():
        with done.open("a") as file:
            file.write("x")

    assert run_and_tee(python(code), dict(os.environ), None, meanwhile=work) == 0


def test_exit_codes_come_back():
    assert run_and_tee(python("raise SystemExit(7)"), dict(os.environ), None) == 7


def test_a_killed_worker_is_told_by_its_signal():
    assert run_and_tee(python("import os; os.kill(os.getpid(), 9)"), dict(os.environ), None) == -9
    assert exit_code(-9) == 128 + 9 and exit_code(7) == 7


def test_a_descendant_that_holds_the_output_does_not_keep_the_launcher(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    log = tmp_path / "console.log"
    assert run_and_tee(python(code), dict(os.environ), log) == 0  # a hang fails by the suite's own limit
    os.kill(int(log.read_text()), signal.SIGKILL)  # it was there all the time


def run_launcher(log: Path, stdout: int | IO) -> subprocess.Popen:
    """A process that runs a worker of many lines; its own output is buffered, as a user's is."""
    code = (
        "import os, sys; from pathlib import Path; from launch.processes import run_and_tee;"
        f"sys.exit(run_and_tee([sys.executable, '-c', 'for i in range(20000): print(i)'], dict(os.environ), Path({str(log)!r})))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize("why", ["the reader leaves", "the disk is full"])
def test_output_that_nobody_takes_ends_the_echo_and_neither_the_run_nor_its_exit_code(tmp_path, why):
    log = tmp_path / "console.log"
    if why == "the disk is full":
        with open("/dev/full", "wb") as full:
            process = run_launcher(log, full)
    else:
        process = run_launcher(log, subprocess.PIPE)
        process.stdout.readline()
        process.stdout.close()
    notes = process.stderr.read()
    assert process.wait() == 0
    assert notes.count("\n") == 1 and "takes no more output" in notes
    assert log.read_text() == "".join(f"{i}\n" for i in range(20000))


def test_a_log_that_is_stdout_itself_has_each_line_once(tmp_path):
    log = tmp_path / "console.log"
    with log.open("ab") as stdout:
        assert run_launcher(log, stdout).wait() == 0
    assert log.read_text() == "".join(f"{i}\n" for i in range(20000))


def test_a_full_disk_ends_the_log_and_not_the_run(capfd):
    assert run_and_tee(python("print('still here')"), dict(os.environ), Path("/dev/full")) == 0
    shown = capfd.readouterr()
    assert "still here" in shown.out and "No space left" in shown.err and "/dev/full" in shown.err


def test_signals_are_blocked_in_what_is_started_and_open_again_in_the_launcher():
    code = "import signal; print(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert run_and_tee(python(f"{code}; raise SystemExit(3)"), dict(os.environ), None) == 3
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert signal.SIGTERM not in before


def test_a_signal_reaches_the_worker_and_the_launcher_waits_for_it(tmp_path):
    code = (
        "import signal, sys, time\n"
        "print('ready')\n"
        "assert signal.sigwait([signal.SIGTERM]) == signal.SIGTERM\n"
        "print('saved'); sys.exit(5)\n"
    )

    log = tmp_path / "console.log"

    def terminate_when_ready():
        while not log.exists() or b"ready" not in log.read_bytes():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=terminate_when_ready, daemon=True).start()
    assert run_and_tee(python(code), dict(os.environ), log) == 5
    assert b"saved" in log.read_bytes()
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_is_said_meanwhile_stands_between_the_lines_of_the_command(tmp_path):
    """A line arrives in pieces: print writes its end by itself."""
    log = tmp_path / "console.log"

    def say():
        with log.open("a") as stream:
            stream.write("note\n")

    code = "import os\nfor _ in range(2000): os.write(1, b'half'); os.write(1, b' a line\\n')"
    assert run_and_tee([sys.executable, "-S", "-c", code], os.environ, log, meanwhile=say) == 0
    lines = log.read_text().splitlines()
    assert lines.count("half a line") == 2000 and set(lines) == {"half a line", "note"}
