"""Exports beside a run (`checkpoint.hf`) that are cut short: nothing half written counts, and the same command makes up for them."""

import os
import signal
from pathlib import Path

from runs import finish, gone, start

from launch.hf_exports import weights_folder
from ngpt.checkpoints.choice import choose_by_sizes

WORDS = ("checkpoint.hf=true", "checkpoint.interval=100")  # one checkpoint, at the end: its export has the priority of any process


def partial(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoints/iter_*/hf.partial"))


def assert_whole(folder: Path, text: str) -> None:
    """The newest checkpoint has its weights, and nothing is left of others."""
    out = weights_folder(choose_by_sizes(folder / "checkpoints").folder)
    assert {"model.safetensors", "config.json", "README.md"} <= {path.name for path in out.iterdir()}
    assert partial(folder) == [] and text.rstrip().endswith(f"Hugging Face weights of step {int(out.parent.name[5:])}: {out}")


def test_a_launcher_that_is_killed_takes_the_export_along_and_the_next_launch_writes_it(tmp_path):
    folder = tmp_path / "run"
    training = start(folder, *WORDS)
    training.wait_for(lambda t: partial(t.folder))
    everybody = training.tree()
    os.kill(training.process.pid, signal.SIGKILL)
    assert training.end() == -signal.SIGKILL and gone(everybody) == []
    assert len(partial(folder)) == 1
    assert_whole(folder, finish(folder, *WORDS).text)


def test_a_signal_to_every_process_ends_the_export_of_a_run_that_has_ended_well(tmp_path):
    folder = tmp_path / "run"
    training = start(folder, *WORDS)
    training.wait_for(lambda t: partial(t.folder))
    everybody = training.tree()
    training.send(signal.SIGTERM, everybody)
    assert training.end() == 0, training.text
    assert gone(everybody) == [] and partial(folder) == []
    told = "note: no Hugging Face weights of step 8: ended by SIGTERM. The same command writes them"
    lines = training.text.splitlines()
    assert lines.count(told) == 1 and lines.index(told) < lines.index("  next")  # before the result of the run, which ends the output
    assert_whole(folder, finish(folder, *WORDS).text)
