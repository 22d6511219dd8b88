"""The launcher starts the workers again after a rollback, and after nothing else. The workers are real processes that train nothing."""

import json
import sys

import pytest

from launch import train
from ngpt.config.compose import compose

# Files as the ranks leave them, written by hand: importing what writes them takes most of a second each time.
WORKER = """
import json, os, signal, sys
from pathlib import Path
folder = Path(sys.argv[1])
ends = json.loads((folder / "ends.json").read_text())
end = ends.pop(0)
(folder / "ends.json").write_text(json.dumps(ends))
if end == "finish":
    (folder / "run/outcome.json").write_text(json.dumps({"status": "finished", "step": 20, "signal": None, "saved": True}))
    sys.exit(0)
if "interrupted" in end:
    os.kill(os.getppid(), signal.SIGTERM)
    assert signal.sigwait([signal.SIGTERM])  # the launcher has passed it on
if "roll back" in end:
    path = folder / "run/rollbacks.json"
    made = json.loads(path.read_text())["rollbacks"] if path.exists() else []
    made.append({"from": 20 - len(ends), "to": 10, "why": "the loss is nan", "time": 1.0})
    path.write_text(json.dumps({"rollbacks": made}))
sys.exit(1)
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Trains with workers that end as given, one after the other; the exit code, and the ends of those that were not started."""
    monkeypatch.setattr(train, "worker_command", lambda *_: [sys.executable, "-c", WORKER, str(tmp_path)])
    monkeypatch.setattr(train, "OTHERS_SECONDS", 0.0)
    config = compose(["experiment=ngpt_tiny", f"run.dir={tmp_path / 'run'}"])

    def launch(*ends: str) -> tuple[int, list[str]]:
        (tmp_path / "ends.json").write_text(json.dumps(ends))
        return train.train_config(config, ["ngpt", "train"]), json.loads((tmp_path / "ends.json").read_text())

    return launch


def test_a_rollback_starts_the_workers_again_and_another_failure_does_not(launch, capfd):
    assert launch("roll back", "roll back", "finish", "not this one") == (0, ["not this one"])
    assert capfd.readouterr().err.count("ngpt train goes back to step 10: the loss is nan") == 2
    assert launch("roll back", "fail", "not this one") == (1, ["not this one"])
    assert launch("fail", "not this one") == (1, ["not this one"])  # those of earlier launches are not followed again


def test_a_signal_during_a_rollback_ends_the_launch(launch, capfd):
    assert launch("interrupted, roll back", "not this one") == (75, ["not this one"])
    assert "ended by SIGTERM after step 10, which is saved; the same command goes on" in capfd.readouterr().err
