"""A rank that behaves towards SLURM as `ngpt train` does, and trains nothing: `stand_in.py CONFIG`.

It counts steps, keeps a checkpoint tracker, saves and leaves with 0 on the first signal (later ones are ignored) and tells the outcome in
the run folder. `behaviour.json` there makes it finish, fail or take long. Each start adds a line to `starts.jsonl`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STEP_SECONDS = 0.1


def main(config_path: str) -> int:
    config = yaml.safe_load(Path(config_path).read_text())
    run_dir, checkpoint_dir = Path(config["run"]["dir"]), Path(config["checkpoint"]["dir"])
    rank, asked = int(os.environ["SLURM_PROCID"]), []
    for number in SIGNALS:
        signal.signal(number, lambda number, _frame: asked.append(signal.Signals(number).name))
    behaviour = {"steps": 10**9, "save_s": 0.0, "save_every": None, "fail_after": None, "failure": "RuntimeError"} | _read(
        run_dir / "behaviour.json"
    )
    tracker = checkpoint_dir / "latest_checkpointed_iteration.txt"
    step = int(tracker.read_text()) if tracker.exists() else 0
    if rank == 0:
        checkpoint_dir.mkdir(exist_ok=True)
        start = {"step": step, "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")), "task": os.environ.get("SLURM_ARRAY_TASK_ID")}
        with (run_dir / "starts.jsonl").open("a") as file:
            file.write(json.dumps(start) + "\n")
    fails_at = behaviour["fail_after"] and step + behaviour["fail_after"]
    while step < behaviour["steps"] and not asked:
        time.sleep(STEP_SECONDS)
        step += 1
        if step == fails_at:
            return _fail(run_dir, rank, behaviour["failure"])
        if rank == 0 and behaviour["save_every"] and step % behaviour["save_every"] == 0:
            tracker.write_text(str(step))
    if rank == 0:
        end = time.monotonic() + behaviour["save_s"]
        while time.monotonic() < end:
            time.sleep(STEP_SECONDS)
        tracker.write_text(str(step))
        outcome = {"status": "signalled" if asked else "finished", "step": step, "signal": asked[0] if asked else None, "saved": True}
        (run_dir / "outcome.json").write_text(json.dumps(outcome))
        (run_dir / "summary.json").write_text(json.dumps({"status": outcome["status"], "steps": step}))
    return 0


def _fail(run_dir: Path, rank: int, error: str) -> int:
    """Rank 1 fails in this step, once the others have come as far; they then wait for it, whatever signals come."""
    reached = run_dir / f"reached{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    if rank != 1:
        reached.touch()
        while True:
            time.sleep(STEP_SECONDS)
    while not reached.exists():
        time.sleep(STEP_SECONDS)
    failure = {"rank": 1, "time": time.time(), "error": error, "message": "as asked", "mistake": error == "ConfigError"}
    (run_dir / "failure_rank1.json").write_text(json.dumps(failure))
    return 2 if error == "ConfigError" else 1


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
