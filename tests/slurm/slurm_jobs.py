"""A job under test: what its run folder and SLURM say of it, and waiting for what should come."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.slurm import scheduler

SECONDS = 240  # after which what is waited for counts as not happening; no statement about speed


@dataclass
class Run:
    """A job and its run folder."""

    folder: Path
    job: str

    def starts(self) -> list[dict]:
        """One for each time that the ranks were started."""
        path = self.folder / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self) -> str:
        path = self.folder / "slurm.log"
        return path.read_text() if path.exists() else ""

    def step(self) -> int:
        path = self.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(path.read_text()) if path.exists() else 0

    def waiting_or_running(self) -> list[str]:
        return [task["state"] for task in scheduler.queue(self.job)]

    def started(self, times: int) -> None:
        self.until(lambda: len(self.starts()) >= times, f"start {times}")

    def ended(self) -> None:
        self.until(lambda: not self.waiting_or_running(), "the end")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            if time.monotonic() > deadline:
                outputs = "\n".join(path.read_text()[-3000:] for path in self.folder.glob("slurm-*.out"))
                pytest.fail(f"{what} of job {self.job} never came: {scheduler.job_state(self.job)}\n{self.log()}\n{outputs}")
            time.sleep(0.2)

    def exit_code(self) -> int:
        """Of the batch script."""
        shown = subprocess.run(["scontrol", "--oneliner", "show", "job", self.job], capture_output=True, text=True, check=True).stdout
        return int(dict(word.split("=", 1) for word in shown.split() if "=" in word)["ExitCode"].split(":")[0])
