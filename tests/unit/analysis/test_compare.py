import math

import pytest

from ngpt.analysis import compare, formats
from ngpt.config.errors import ConfigError
from tests.unit.analysis.runs import STEP_SECONDS, TOKENS_PER_STEP, record, summary, write_run


def cells(rows):
    return {row.label: row.cells for row in rows}


def test_config_diff_lists_only_what_differs_and_not_the_runs_own_paths(tmp_path):
    first = write_run(tmp_path / "a")
    second = write_run(tmp_path / "b", config={"optim": {"lr": 2e-2}, "megatron": {"swa": 128}, "checkpoint": {"load": "elsewhere"}})
    diff = cells(compare.config_diff(compare.load_runs([first, second])))
    assert diff == {"optim.lr": ["0.01", "0.02"], "megatron.swa": ["(absent)", "128"], "checkpoint.load": ["(absent)", "elsewhere"]}


def test_config_diff_tells_null_from_absent_and_names_paths_outside_the_run(tmp_path):
    first = write_run(tmp_path / "a", config={"cluster": {"gpu": None}})
    second = write_run(tmp_path / "b", config={"checkpoint": {"dir": f"{tmp_path}/abc"}})
    diff = cells(compare.config_diff(compare.load_runs([first, second])))
    assert diff == {"cluster.gpu": ["null", "(absent)"], "checkpoint.dir": ["<run.dir>/checkpoints", f"{tmp_path}/abc"]}


def test_training_time_adds_steps_over_gaps_and_not_validations(tmp_path):
    validation = {"step": 1, "tokens": TOKENS_PER_STEP, "val_loss": 3.0}
    lines = [record(1), validation, record(11), {"step": 15, "tokens": 0}, record(21, step_time_s=1.0)]
    run = compare.load_run(write_run(tmp_path / "a", lines))
    steps = [STEP_SECONDS, STEP_SECONDS, 11 * STEP_SECONDS, 11 * STEP_SECONDS, 11 * STEP_SECONDS + 10 * 1.0]
    assert run.training_seconds == pytest.approx(steps)


def test_series_keep_a_gap_where_the_value_was_not_finite_and_skip_what_was_not_measured(tmp_path):
    lines = [record(step, train_loss=loss) for step, loss in enumerate((9.0, math.nan, None, 7.0), start=1)]
    run = compare.load_run(write_run(tmp_path / "a", lines))
    x, y = run.series("train_loss", run.tokens)
    assert x == [TOKENS_PER_STEP, 2 * TOKENS_PER_STEP, 4 * TOKENS_PER_STEP]
    assert math.isnan(y[1]) and y[2] == 7.0
    assert run.series("mfu", run.tokens) == ([], [])


@pytest.mark.parametrize(
    ("written", "kind", "message"),
    [
        (None, "unfinished", "Last logged step 100 of 100"),
        (summary(), "finished", "Finished at step 100"),
        (summary(status="stopped"), "stopped", "Stopped before the end"),
        (summary(status="failed", error="loss is NaN"), "failed", "loss is NaN"),
        (summary(status="exploded"), "failed", "exploded"),
        (summary(steps=50), "unfinished", "Last logged step 100"),  # left by the run before it was resumed
    ],
)
def test_status(tmp_path, written, kind, message):
    status = compare.load_run(write_run(tmp_path / "a", summary=written)).status
    assert status.kind == kind and message in status.message


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / "x" / "same"), write_run(tmp_path / "y" / "same"), write_run(tmp_path / "other")]
    assert [run.name for run in compare.load_runs(folders)] == [str(folders[0]), str(folders[1]), "other"]


def test_a_folder_that_is_no_run_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        compare.load_run(tmp_path / "missing")
    run = write_run(tmp_path / "a")
    with pytest.raises(ConfigError, match=f"without config.yaml.*Give one or more of: {run}"):
        compare.load_run(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", "", "no logged step"),
        ("metrics.jsonl", None, "no such file"),
        ("config.yaml", "a: [", "Must be the YAML"),
        ("config.yaml", "- 1", "Must be a mapping"),
        ("summary.json", "{", "Must be the JSON"),
        ("environment.json", "[]", "Must be a JSON object"),
    ],
)
def test_a_damaged_run_names_the_file(tmp_path, file, content, message):
    path = write_run(tmp_path / "a") / file
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"{file}: .*{message}"):
        compare.load_run(path.parent)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (1500, "1.5K"), (999_950, "1M"), (1_250_000_000, "1.25B"), (3e12, "3T")]
)
def test_counts_are_short(value, text):
    assert formats.count(value) == text
