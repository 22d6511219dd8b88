"""A sweep as an array of jobs with the real training: one member fails, the others do not care, and it is repeated alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

from slurm_jobs import Run

from launch.slurm import scheduler
from launch.slurm.jobs import last_job
from launch.sweep_status import sweep_status

ROOT = Path(__file__).resolve().parents[2]
SWEEP = ["experiment=ngpt_tiny", "train.seed=1,2,3", "train.steps=2", "train.eval_steps=0", "run.name=swept"]
AS_JOBS = ["cluster.scheduler=slurm", "cluster.save_time_s=1", "cluster.max_restarts=0", "cluster.environment.OMP_NUM_THREADS='1'"]


def ngpt(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def statuses(sweep: Path) -> dict[str, str]:
    return {member["name"]: member["status"] for member in sweep_status(sweep)["members"]}


def test_a_member_of_an_array_that_fails_is_repeated_alone(workplace):
    sweep = workplace / "runs/swept"
    blocked = sweep / "seed=2/checkpoints"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder should be")
    assert "3 tasks" in ngpt(workplace, "launch", "-m", *SWEEP, *AS_JOBS, "--parallel", "2")
    first = last_job(sweep / "seed=1").partition("_")[0]
    assert [last_job(sweep / f"seed={seed}") for seed in (1, 2, 3)] == [f"{first}_0", f"{first}_1", f"{first}_2"]
    job = Run(sweep / "seed=2", first)
    job.ended()
    assert statuses(sweep) == {"seed=1": "done", "seed=2": "failed", "seed=3": "done"}
    assert "exit code 2; a restart would repeat it" in sweep_status(sweep)["members"][1]["why"]

    blocked.unlink()
    assert "1 tasks" in ngpt(workplace, "launch", "-m", *SWEEP, *AS_JOBS)
    again = last_job(sweep / "seed=2").partition("_")[0]
    assert again != first and last_job(sweep / "seed=1") == f"{first}_0"
    Run(sweep / "seed=2", again).ended()
    assert set(statuses(sweep).values()) == {"done"}
    assert all(len((sweep / f"seed={seed}/metrics.jsonl").read_text().splitlines()) == 2 for seed in (1, 2, 3))
    assert "step 2/2" in (sweep / f"seed=2/slurm-{again}_0.out").read_text()


def test_stopping_a_sweep_stops_what_runs_and_what_waits(workplace):
    long = ["experiment=ngpt_tiny", "train.seed=1,2", "train.steps=1000000", "run.name=long", "train.eval_steps=0", *AS_JOBS]
    ngpt(workplace, "launch", "-m", *long, "--parallel", "1")
    sweep = workplace / "runs/long"
    job = last_job(sweep / "seed=1").partition("_")[0]
    run = Run(sweep / "seed=1", job)
    run.until(lambda: (sweep / "seed=1/metrics.jsonl").exists(), "training")
    assert statuses(sweep) == {"seed=1": "running", "seed=2": "pending"}
    assert "0 done, 2 waiting or running: nothing to submit" in ngpt(workplace, "launch", "-m", *long)
    said = ngpt(workplace, "stop", "runs/long")
    assert "save and leave" in said and "was waiting and is cancelled" in said
    run.ended()
    assert run.step() > 0 and not (sweep / "seed=2/metrics.jsonl").exists()
    assert statuses(sweep) == {"seed=1": "stopped", "seed=2": "waiting"}
    assert json.loads((sweep / "seed=1/outcome.json").read_text())["status"] == "signalled"
    assert not scheduler.queue(job)
