"""summary.json of a resumed run: a damaged one of its earlier part costs its figures, not the run."""

import json

import pytest

from megatron_ext.training.summary import write_summary
from ngpt.config import compose

INTACT = '{"wall_time_s": 5.0, "val_loss": 3.0}'


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000, '{"wall_time_s": "long"}', "{}", INTACT])
def test_a_damaged_earlier_summary_does_not_fail_the_run(tmp_path, content):
    config = compose(["experiment=ngpt_tiny", f"run.dir={tmp_path}"])
    (tmp_path / "summary.json").write_text(content)
    write_summary(config, "local", "none", {"step": 4}, "finished", 2.0, start_step=2)
    summary = json.loads((tmp_path / "summary.json").read_text())
    intact = content == INTACT
    assert summary["wall_time_s"] == (7.0 if intact else 2.0) and summary["val_loss"] == (3.0 if intact else None)
