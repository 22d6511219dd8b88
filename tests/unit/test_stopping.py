"""Stop signals: nothing is lost, everything is taken once, and children are immune. Run in processes of their own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD = "import os, signal, sys, time\nfrom ngpt.stopping import STOP_SIGNALS, StopRequest, block_stop_signals\n"


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", HEAD + code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_during_start_up_leaves_also_while_the_main_thread_waits(name):
    code = f"""
request = StopRequest(lambda number: (print(number.name, flush=True), os._exit(75)))
block_stop_signals()
os.kill(os.getpid(), signal.{name})  # before anybody listens: it waits
request.listen()
import ctypes; ctypes.CDLL(None).pause()  # no Python runs in the main thread any more
"""
    done = run(code)
    assert (done.returncode, done.stdout.strip()) == (75, name), done.stderr


def test_while_training_the_first_signal_is_kept_and_repeats_change_nothing():
    code = """
request = StopRequest(lambda number: os._exit(9))
request.listen()
request.training_starts()
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
    os.kill(os.getpid(), number)
    while request.signal is None: time.sleep(0.001)
time.sleep(0.05)
print(request.signal.name)
"""
    done = run(code)
    assert (done.returncode, done.stdout.strip()) == (0, "SIGUSR1"), done.stderr


def test_what_multiprocessing_unblocks_is_taken_too_and_ends_no_forked_process():
    code = """
request = StopRequest(lambda number: os._exit(9))
request.listen()
request.training_starts()
import multiprocessing
from multiprocessing import resource_tracker
resource_tracker.ensure_running()
assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # else this test proves nothing
child = multiprocessing.get_context("fork").Process(target=lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.05), os._exit(7)))
child.start()
child.join()
assert request.signal is None
os.kill(os.getpid(), signal.SIGTERM)
while request.signal is None: time.sleep(0.001)
print(child.exitcode, request.signal.name)
"""
    done = run(code)
    assert (done.returncode, done.stdout.strip()) == (0, "7 SIGTERM"), done.stderr


def test_children_of_a_rank_outlive_a_signal_to_every_process():
    code = """
StopRequest(lambda number: None).listen()
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import os, signal; [os.kill(os.getpid(), n) for n in (1, 2, 10, 12, 15)]; print('alive')"])
sys.exit(child.wait())
"""
    done = run(code)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


@pytest.mark.parametrize("ignored", [True, False])
def test_under_nohup_a_hangup_is_no_reason_to_leave(ignored):
    code = "from ngpt.stopping import STOP_SIGNALS; import signal; print(signal.SIGHUP in STOP_SIGNALS)"
    inherit = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignored else None
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=inherit, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(not ignored)
