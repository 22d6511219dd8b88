"""Exports beside a run (`checkpoint.hf`) that are cut short: nothing half written counts, and the same command makes up for them."""

import os
import signal
from pathlib import Path

from runs import finish, gone, start

from launch.hf_exports import weights_folder
from ngpt.checkpoints.choice import choose_by_sizes

LONG = ("checkpoint.hf=true", "train.steps=100000", "train.eval_interval=1000", "checkpoint.interval=50")


def partial(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoints/iter_*/hf.partial"))


def assert_whole(folder: Path, text: str) -> None:
    """The newest checkpoint has its weights, and nothing is left of others."""
    out = weights_folder(choose_by_sizes(folder / "checkpoints").folder)
    assert {"model.safetensors", "config.json", "README.md"} <= {path.name for path in out.iterdir()}
    assert partial(folder) == [] and text.rstrip().endswith(f"Hugging Face weights of step {int(out.parent.name[5:])}: {out}")


def test_a_launcher_that_is_killed_takes_the_export_along_and_the_next_launch_writes_it(tmp_path):
    folder = tmp_path / "run"
    training = start(folder, "checkpoint.hf=true")
    training.wait_for(lambda t: partial(t.folder))
    everybody = training.tree()
    os.kill(training.process.pid, signal.SIGKILL)
    assert gone(everybody) == [] and training.end() == -signal.SIGKILL
    assert len(partial(folder)) == 1
    assert_whole(folder, finish(folder, "checkpoint.hf=true").text)


def test_a_signal_to_every_process_waits_for_no_export(tmp_path):
    folder = tmp_path / "run"
    training = start(folder, *LONG)
    training.wait_for(lambda t: partial(t.folder))
    everybody = training.tree()
    training.send(signal.SIGTERM, everybody)
    assert training.end() == 75, training.text
    assert gone(everybody) == [] and partial(folder) == []
    step = training.newest_step
    assert f"after step {step}, which is saved" in training.text
    assert not weights_folder(folder / "checkpoints" / f"iter_{step:07d}").exists()
    words = (*LONG, f"train.stop_after={step}")
    assert_whole(folder, finish(folder, *words).text)
