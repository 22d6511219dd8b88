"""A real sweep of two seeds: one member fails and is repeated alone, and the report groups them. Several keys: tests/unit."""

import json
import re
from pathlib import Path

from torchrun import ngpt

SWEEP = ["train", "-m", "experiment=ngpt_tiny", "train.seed=1,2", "train.steps=3", "--parallel", "2"]


def test_a_sweep_goes_on_where_a_member_has_failed(tmp_path: Path):
    sweep = tmp_path / "runs/ngpt_tiny-sweep"
    blocked = sweep / "seed=1" / "environment.json"
    blocked.mkdir(parents=True)  # a folder where a file should be
    first = ngpt(*SWEEP, cwd=tmp_path)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "seed=1 failed: " in first.stdout and "run.name=ngpt_tiny-sweep_seed=1 run.dir=" in first.stdout

    blocked.rmdir()
    rows = {path.parent.name: path.read_bytes() for path in sweep.glob("*/metrics.jsonl")}
    assert len(rows) == 1
    second = ngpt(*SWEEP, cwd=tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2 members, train.seed (2), 2 at a time, 1 done before" in second.stdout
    assert {name: (sweep / name / "metrics.jsonl").read_bytes() for name in rows} == rows
    assert {member["status"] for member in json.loads((sweep / "sweep.json").read_text())["members"]} == {"done"}
    for run in sweep.glob("seed=*"):
        summary, console = json.loads((run / "summary.json").read_text()), (run / "console.log").read_text()
        assert summary["status"] == "finished" and summary["steps"] == 3
        assert console.count("step 3/3") == 1 and "finished after step 3" in console  # each line once, the launcher's own too

    report = ngpt("report", "runs/ngpt_tiny-sweep", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    page = (sweep / "report/index.html").read_text()
    assert "<title>ngpt_tiny-sweep: train.seed</title>" in page and "ngpt_tiny-sweep (2 seeds)" in page
    assert re.search(r"<td[^>]*><div>\d\.\d{4} ± \d\.\d{4}", page)
