"""Commands, copied output, exit codes and signals of worker processes; the workers are small stand-ins."""

import os
import signal
import sys
import threading
import time

from launch import processes
from launch.processes import run_and_tee, worker_command


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_one_process_needs_no_torchrun(tmp_path):
    assert worker_command(["train", "c.yaml"], 1, tmp_path)[1:] == ["-m", "launch.worker", "train", "c.yaml"]


def test_several_processes_run_under_torchrun(tmp_path):
    command = worker_command(["train", "c.yaml"], 3, tmp_path)
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert command[command.index("--nproc-per-node") + 1] == "3"
    assert command[-4:] == ["-m", "launch.worker", "train", "c.yaml"]


def test_output_is_shown_and_appended_without_the_prefix_of_the_reporting_rank(tmp_path, capsysbinary):
    log = tmp_path / "console.log"
    log.write_text("earlier\n")
    code = "import sys; print('[rank1]:loss 1'); print('[rank0]:loss 2', file=sys.stderr); print('plain', end='')"
    assert run_and_tee(python(code), dict(os.environ), log, reporting_rank=1) == 0
    assert capsysbinary.readouterr().out == b"loss 1\n[rank0]:loss 2\nplain"
    assert log.read_bytes() == b"earlier\nloss 1\n[rank0]:loss 2\nplain"


def test_a_prefix_cut_in_two_by_the_pipe_is_still_removed():
    class Pieces:
        def __init__(self):
            self.pieces = [b"a\n[ra", b"nk0]:b\n", b"step 1\r", b"step 2\r", b""]

        def read1(self):
            return self.pieces.pop(0)

    arrived = list(processes._arriving(Pieces(), b"[rank0]:"))
    assert b"".join(arrived) == b"a\nb\nstep 1\rstep 2\r"
    assert b"step 1\r" in arrived  # shown before its line ends


def test_exit_codes_come_back():
    assert run_and_tee(python("raise SystemExit(7)"), dict(os.environ), None) == 7


def test_a_killed_worker_counts_as_128_plus_the_signal():
    assert run_and_tee(python("import os; os.kill(os.getpid(), 9)"), dict(os.environ), None) == 128 + 9


def test_a_signal_reaches_the_worker_and_the_launcher_waits_for_it(tmp_path):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(5)))\n"
        "print('ready')\n"
        "time.sleep(60)\n"
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
