"""summary.json of a resumed run: a damaged one of its earlier part costs its figures, not the run."""

import json
from types import SimpleNamespace

import pytest

from megatron_ext.training import summary as summaries
from megatron_ext.training.summary import write_summary
from ngpt.checkpoints.choice import Choice
from ngpt.config import compose

INTACT = '{"wall_time_s": 5.0, "val_loss": 3.0}'


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000, '{"wall_time_s": "long"}', "{}", INTACT])
def test_a_damaged_earlier_summary_does_not_fail_the_run(tmp_path, content):
    config = compose(["experiment=ngpt_tiny", f"run.dir={tmp_path}"])
    (tmp_path / "summary.json").write_text(content)
    write_summary(config, "local", {}, {"step": 4}, "finished", 2.0, start_step=2)
    summary = json.loads((tmp_path / "summary.json").read_text())
    intact = content == INTACT
    assert summary["wall_time_s"] == (7.0 if intact else 2.0) and summary["val_loss"] == (3.0 if intact else None)


@pytest.mark.parametrize(("lines", "spikes"), [(None, None), (["{", "{}"], None), ([], 1)], ids=["missing", "damaged", "whole"])
def test_spikes_are_counted_in_what_all_launches_recorded(tmp_path, lines, spikes):
    config = compose(["experiment=ngpt_tiny", f"run.dir={tmp_path}"])
    if lines is not None:
        records = [{"step": step, "train_loss": 2.0} for step in range(1, 31)] + [{"step": 31, "val_loss": 9.0}]
        records += [{"step": 32, "train_loss": None, "nonfinite": ["train_loss"]}, {"step": 33, "train_loss": 3.0}]
        lines = lines or [json.dumps(record) for record in records]
        (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    write_summary(config, "local", {}, {"step": 33}, "finished", 2.0, start_step=20)
    assert json.loads((tmp_path / "summary.json").read_text())["loss_spikes"] == spikes


@pytest.mark.parametrize(("ffn", "said"), [(160, False), (20480, True)])
def test_the_header_names_rows_that_no_kernel_takes(monkeypatch, ffn, said):
    monkeypatch.setattr(summaries, "on_gpu", lambda: True)
    line = summaries.row_operations(compose(["experiment=ngpt_tiny", f"model.ffn_hidden_size={ffn}"]), "local")
    assert ("eager torch for rows of 20,480 features" in line) is said


def test_the_header_says_where_a_start_begins(tmp_path):
    args = SimpleNamespace(load="other/checkpoints", finetune=True)
    start = Choice(tmp_path, 55)
    assert "starts at step 1 from the weights of other/checkpoints, step 55" in summaries.start_line(args, start)
    args.finetune = False
    assert summaries.start_line(args, start) == "  continues from other/checkpoints, step 55"
    assert summaries.start_line(args, None) == "  starts from random weights"


@pytest.mark.parametrize(("steps", "notes"), [(3, 1), (9, 1), (14, 0)])
def test_a_run_too_short_for_its_decay_says_so(steps, notes):
    config = compose(["experiment=ngpt_tiny", "schedule=wsd", "schedule.warmup_steps=0", f"train.steps={steps}"])  # 15 %: 1 or 2 steps
    assert len(summaries.schedule_lines(config)) == notes
