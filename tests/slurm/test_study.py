"""A study as arrays of jobs, whose runs are stand-ins: branches after trunks, a trunk that fails and is repeated, and the page."""

import json
import sys
from pathlib import Path

from slurm_jobs import Run

from launch import cli, submit
from launch.slurm.jobs import last_job
from launch.slurm.script import render
from tests.unit.study.studies import HEAD, TAIL

STUDY = (
    HEAD
    + """\
words: [experiment=ngpt_tiny, train.steps=4]
lists: {seed: [1, 2]}
arms:
  trunk: {until: 0.5}
  branch: {after: trunk}
"""
    + TAIL
)
AS_JOBS = ["cluster.scheduler=slurm", "cluster.save_time_s=1", "cluster.save_margin_s=0", "cluster.max_restarts=0", "--slurm"]


def test_branches_follow_their_trunks_and_what_failed_is_repeated(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    (workplace / "conf/study").mkdir(parents=True)
    (workplace / "conf/study/mine.yaml").write_text(STUDY)
    folder = workplace / "runs/studies/mine_small"
    stand_in = Path(__file__).with_name("stand_in.py")

    def rendered(config, run_dir, work_dir):
        return render(config, run_dir, work_dir, [sys.executable, str(stand_in), str(run_dir / "config.yaml")])

    def submitted() -> tuple[str, list[str]]:
        """What the command said, and which jobs it submitted."""
        assert cli.main(["study", "mine", "--config-dir", "conf", *AS_JOBS]) == 0
        out = capsys.readouterr().out
        return out, out.partition("\njobs ")[2].partition(":")[0].split()

    monkeypatch.setattr(submit, "render", rendered)
    monkeypatch.setattr(submit, "check_resumable", lambda config: None)  # a stand-in saves no checkpoint
    runs = [f"{arm}/seed={seed}" for arm in ("trunk", "branch") for seed in (1, 2)]
    for name in runs:
        (folder / name).mkdir(parents=True)
        (folder / name / "behaviour.json").write_text(json.dumps({"steps": 10}))
    (folder / "trunk/seed=2/checkpoints").write_text("a file where a folder should be")

    out, jobs = submitted()
    assert len(jobs) == 3 and "4 submitted" in out
    assert [last_job(folder / name) for name in runs] == [f"{jobs[0]}_0", f"{jobs[0]}_1", f"{jobs[1]}_0", f"{jobs[1]}_1"]
    Run(folder, jobs[2]).ended()
    branch = Run(folder / "branch/seed=1", jobs[1])
    ended, begun = (folder / "trunk/seed=1/summary.json").stat(), (branch.folder / "starts.jsonl").stat()
    assert len(branch.starts()) == 1 and ended.st_mtime < begun.st_mtime
    lost = Run(folder / "branch/seed=2", jobs[1])
    assert lost.starts() == [] and "not started: its trunk" in lost.log()
    assert json.loads((folder / "results.json").read_bytes())["name"] == "mine" and (folder / "index.html").exists()

    (folder / "trunk/seed=2/checkpoints").unlink()
    out, again = submitted()
    assert len(again) == 3 and not {*jobs} & {*again} and "4 runs, 2 finished, 0 waiting or running, 2 submitted" in out
    Run(folder, again[2]).ended()
    assert all((folder / name / "summary.json").exists() for name in runs)
    assert len(branch.starts()) == 1 and len(lost.starts()) == 1
    out, page = submitted()  # stand-ins log no metrics: the page still lacks every run
    assert len(page) == 1 and "4 runs, 4 finished, 0 waiting or running, 0 submitted" in out
    Run(folder, page[0]).ended()
