"""10,000 damaged inputs through the code that commands call, and 200 through the commands: no traceback, no hang, nothing half written."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent / "fuzz.py"


def run(*words, timeout):
    command = [sys.executable, str(FUZZ), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_ten_thousand_damaged_inputs(tmp_path):
    found = run("--count", "10000", "--keep", str(tmp_path), timeout=3000)
    assert sum(int(line.split(": ")[1].split()[0]) for line in found.splitlines()) == 10_000 and found.count(" 0 failed") == 10


def test_two_hundred_real_commands(tmp_path):
    assert "commands: 200" in run("--target", "--commands", "200", "--keep", str(tmp_path), timeout=2400)


def test_the_fuzzer_sees_errors_and_hangs(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(str(FUZZ.parent))
    import fuzz as module

    def fails(rng, fixtures):
        if rng.random() < 0.5:
            raise KeyError("x")
        while True:
            pass

    monkeypatch.setitem(module.TARGETS, "fails", (fails, 1))
    monkeypatch.setattr(module, "ALARM_S", 1)
    ends = module.run_target("fails", range(5), 0, tmp_path)
    assert ends["failed"] == 5 and {kind.partition(" at ")[0] for kind in ends} == {"failed", "KeyError", "Hang"}
