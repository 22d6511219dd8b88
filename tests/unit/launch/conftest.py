"""SLURM's commands for the tests of this folder: real processes that say what SLURM says. SLURM itself: tests/slurm."""

import os
import shlex
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).with_name("slurm_programs.sh")
FIELDS = {"JobState": "PENDING", "Reason": "None", "Restarts": 0, "PreemptTime": "None", "NodeList": "", "RunTime": "0:00"}
FIELDS |= {"TimeLeft": "5:00", "StartTime": "2026-11-29T11:48:51"}  # of a job, unless it says otherwise


class Slurm:
    """A controller; the test decides what it knows."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "jobs").mkdir()
        _write(folder / "fields", FIELDS)
        for name in ("sbatch", "squeue", "scontrol", "scancel"):
            program = folder / name
            program.write_text(f'#!/bin/sh\nset -- {shlex.join([str(folder), name])} "$@"\n. {shlex.quote(str(PROGRAMS))}\n')
            program.chmod(0o755)

    @property
    def jobs(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "jobs").iterdir())

    def of(self, job: str, field: str) -> str | None:
        """What is known of a job and what has become of it: requeued, heard, script, environment."""
        path = self.folder / "jobs" / job / field
        return path.read_text().removesuffix("\n") if path.exists() else None

    def environment(self, job: str) -> dict[str, str]:
        """What it was submitted with."""
        return dict(entry.split("=", 1) for entry in self.of(job, "environment").split("\0") if entry)

    def set(self, job: str, **fields: str | int) -> None:
        """A job as SLURM has it from now on."""
        folder = self.folder / "jobs" / job
        _write(folder, fields if folder.exists() else FIELDS | fields)

    def answers(self, *answers: tuple[int, str]) -> None:
        """Exit codes and errors of the next commands; 0 is an answer from what is known."""
        (self.folder / "answers").write_text("".join(f"{code} {words}\n" for code, words in answers))

    def takes(self, seconds: float) -> None:
        """For each answer."""
        (self.folder / "seconds").write_text(str(seconds))

    @property
    def asked(self) -> int:
        """How many commands came."""
        return (self.folder / "asked").read_text().count("\n")


def _write(folder: Path, fields: dict[str, str | int]) -> None:
    folder.mkdir(exist_ok=True)
    for name, value in fields.items():
        (folder / name).write_text(f"{value}\n")


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch) -> Slurm:
    folder = tmp_path_factory.mktemp("slurm")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Slurm(folder)
