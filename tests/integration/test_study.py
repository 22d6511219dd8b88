"""A whole study of four runs: a branch goes on as if never cut off, and neither a second call nor the same study by another name trains."""

import json

import pytest
from torchrun import ngpt

STUDY = """\
# A study of a test.
claim: A branch goes on as its trunk would have.
paper: None.
tuning: None.
words:
  - experiment=ngpt_tiny
  - data.mock=false
  - "data.train=[{path: text/train}]"
  - "data.valid=[{path: text/valid}]"
  - train.eval_interval=2
  - train.eval_steps=2
lists: {seed: [7]}
arms:
  trunk: {until: 0.5}
  branch: {after: trunk}
  quantised: {after: trunk, words: [precision=nvfp4_paper]}
  whole: {}
analyses:
  ptq: {what: ptq, arms: [branch], options: [--tokens, "128"]}
measures:
  loss: {key: val_loss, unit: nats per token}
  cost: {source: ptq, key: arms/both_16x16/difference}
comparisons:
  change: {measure: loss, arms: [branch, quantised], less: {"*": whole}}
  cost: {measure: cost, arms: [branch]}
figures:
  - {title: The change, kind: tokens, of: [change]}
verdict:
  - {comparison: change, arms: [branch], must: stay_within, value: 1.0e-5}
sizes:
  only: {words: [train.steps=8]}
"""


@pytest.mark.studies
def test_a_study_branches_measures_and_goes_on(tmp_path):
    (tmp_path / "conf/study").mkdir(parents=True)
    (tmp_path / "conf/study/mine.yaml").write_text(STUDY)
    (tmp_path / "raw").mkdir()
    for number in range(40):
        (tmp_path / "raw" / f"{number:02d}.txt").write_text(f"Text {number} of forty, and what it says of {number * 7919}. " * 20)
    prepared = ngpt("data", "prepare", "raw", "--out", "text", "--split", "80,20,0", cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    study = ("study", "mine", "--config-dir", "conf", "--parallel", "2")
    first = ngpt(*study, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    folder = tmp_path / "runs/studies/mine_only"
    found = json.loads((folder / "results.json").read_bytes())
    assert found["missing"] == []
    runs = {run["arm"]: run for run in found["runs"]}
    assert [run["status"] for run in runs.values()] == ["stopped", "finished", "finished", "finished"]
    losses = {arm: dict(run["curves"]["val_loss"]) for arm, run in runs.items()}
    assert losses["trunk"] | losses["branch"] == pytest.approx(losses["whole"], abs=1e-5)
    assert max(losses["trunk"]) < min(losses["quantised"])
    assert abs(losses["quantised"][max(losses["whole"])] - losses["whole"][max(losses["whole"])]) > 1e-5
    assert runs["branch"]["measures"]["cost"] is not None and (folder / "index.html").stat().st_size > 10_000
    second = ngpt(*study, cwd=tmp_path)
    assert second.returncode == 0 and " running" not in second.stdout
    assert json.loads((folder / "results.json").read_bytes())["comparisons"] == found["comparisons"]
    (tmp_path / "conf/study/other.yaml").write_text(STUDY)
    shared = ngpt("study", "other", "--config-dir", "conf", cwd=tmp_path)
    assert shared.returncode == 0 and " running" not in shared.stdout, shared.stdout + shared.stderr
    other = json.loads((tmp_path / "runs/studies/other_only/results.json").read_bytes())
    assert other["comparisons"] == found["comparisons"]
    assert [run["origin"] for run in other["runs"]] == [f"mine_only/{run['name']}" for run in found["runs"]]
