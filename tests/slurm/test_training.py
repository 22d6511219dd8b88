"""The real training as a job of `ngpt launch` on two nodes: warned and preempted, it ends with the numbers of an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_jobs import Run

from launch.slurm import scheduler
from launch.slurm.jobs import last_job

ROOT = Path(__file__).resolve().parents[2]
STEPS = 400
COMMON = [
    "experiment=ngpt_tiny",
    f"train.steps={STEPS}",
    "train.eval_steps=0",
    "checkpoint.interval=1000",
    "debug=deterministic",
    "cluster.environment.OMP_NUM_THREADS='1'",
]
AS_JOB = ["cluster.scheduler=slurm", "cluster.nodes=2", "cluster.environment.GLOO_SOCKET_IFNAME=lo", "cluster.save_time_s=1"]


def ngpt(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(run: Path) -> list[tuple]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["train_loss"], row["grad_norm"]) for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("twin")
    ngpt(folder, "train", *COMMON, "run.name=twin", "cluster.gpus_per_node=2")
    return losses(folder / "runs/twin")


def trains(run: Run, step: int) -> bool:
    return any(row[0] >= step for row in losses(run.folder)) if (run.folder / "metrics.jsonl").exists() else False


def test_a_run_on_two_nodes_warned_and_preempted_ends_as_an_undisturbed_one(workplace, undisturbed):
    ngpt(workplace, "launch", *COMMON, *AS_JOB, "run.name=real", "cluster.partition=patient", 'cluster.sbatch=["--exclusive"]')
    folder = workplace / "runs/real"
    run = Run(folder, last_job(folder))
    run.until(lambda: trains(run, 3), "step 3")
    assert scheduler.signal_tasks(run.job) is None  # what --signal sends, to the same processes
    run.until(lambda: scheduler.job_state(run.job).restarts == 1, "the restart after the warning")
    warned_at = run.step()
    assert 3 <= warned_at < STEPS
    run.until(lambda: trains(run, warned_at + 3), "steps of the second start")
    subprocess.run(["srun", "--partition=urgent", "--nodes=2", "--exclusive", "true"], check=True, timeout=300)
    run.until(lambda: scheduler.job_state(run.job).restarts == 2, "the restart after the preemption")
    assert warned_at + 3 <= run.step() < STEPS
    run.ended()
    assert run.exit_code() == 0
    assert json.loads((folder / "outcome.json").read_text())["status"] == "finished"
    assert losses(folder) == undisturbed
    assert ngpt(workplace, "status", "runs/real").startswith(f"runs/real: finished, step {STEPS} of {STEPS}\n")
    assert len(list((folder / "launches").iterdir())) == 3  # the launch, and two of the three starts
