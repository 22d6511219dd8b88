"""Starts real `ngpt train` commands with faults in them, and compares what they leave with a run that nothing disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # a hang ends here; no statement about speed
STEPS = 8
WORDS = [
    "experiment=ngpt_tiny", f"train.steps={STEPS}", "train.eval_interval=4", "train.eval_steps=2", "checkpoint=periodic",
    "checkpoint.interval=3", "logging.interval=1",
]  # fmt: skip
TWO_RANKS = ("cluster.gpus_per_node=2",)


@dataclass
class Training:
    """A started `ngpt train`, with what it has printed so far in a file."""

    process: subprocess.Popen
    folder: Path
    output: Path

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, happened: Callable[["Training"], object]) -> None:
        """Waits until `happened`. A run that ends before, or a timeout, fails the test with the output."""
        deadline = time.monotonic() + SECONDS
        while not happened(self):
            assert self.process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda training: f"step {step:>{len(str(STEPS))}}/" in training.text)

    def tree(self) -> list[psutil.Process]:
        """The launcher and all that descends from it."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def ranks(self) -> list[psutil.Process]:
        """The workers, by rank."""
        workers = [process for process in self.tree() if "launch.worker" in _words(process)]
        return sorted(workers, key=lambda process: int(process.environ().get("RANK", "0")))

    def send(self, number: int, processes: Sequence[psutil.Process]) -> None:
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                pass

    def end(self) -> int:
        """The exit code, once the command has ended."""
        try:
            return self.process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL, self.tree())
            raise AssertionError(f"still running: {self.text}") from None

    @property
    def newest_step(self) -> int | None:
        tracker = self.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else None


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def start(folder: Path, *words: str, fault: dict | None = None, **environment: str) -> Training:
    """Starts `ngpt train` for the run folder `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    output = folder.with_name(folder.name + ".out")
    paths = [str(ROOT / "tests/faults/injection"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "NGPT_FAULT": json.dumps(fault) if fault else "",
    }
    command = [sys.executable, "-m", "launch.cli", "train", *WORDS, f"run.dir={folder}", f"run.name={folder.name}", *words]
    with output.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=folder.parent, env=variables | environment, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    return Training(process, folder, output)


def finish(folder: Path, *words: str) -> Training:
    """Runs the same command to its end."""
    training = start(folder, *words)
    assert training.end() == 0, training.text
    return training


def last_row(folder: Path) -> dict:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def tensors(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, masters and moments."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder / "checkpoints" / f"iter_{step:07d}")
    entries = reader.read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def assert_same_run(folder: Path, twin: Path) -> None:
    """The same last loss, and the same bits of every weight and optimizer state."""
    assert last_row(folder)["train_loss"] == last_row(twin)["train_loss"]
    mine, wanted = tensors(folder), tensors(twin)
    assert mine.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(mine[name], wanted[name])] == []


def gone(processes: Sequence[psutil.Process], seconds: float = 20.0) -> list[psutil.Process]:
    """Those processes that are still there after `seconds`."""
    _, alive = psutil.wait_procs(list(processes), timeout=seconds)
    return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
