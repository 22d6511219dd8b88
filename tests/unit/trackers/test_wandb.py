"""Weights & Biases through its real client, offline: what a run folder's files hold over several launches."""

import json
from pathlib import Path

import pytest

from launch.extras import check_extras
from ngpt.config import ConfigError, compose
from ngpt.trackers.weights_and_biases import RUN_FILE, own_run_id
from tests.unit.trackers.wandb_launches import launch, launches, needs_client


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run ended by a signal after step 3, and gone on behind its checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("wandb")
    options = ["logging.wandb.project=other", "logging.wandb.group=pairs", "logging.wandb.tags=[a,b]"]
    options += ["cluster.environment.HF_TOKEN=secret"]
    assert launch(folder, "signalled", 1, 3, *options) == ""
    assert launch(folder, "finished", 3, 4, *options) == ""
    return folder / "run"


@needs_client
def test_a_folders_launches_are_one_run_with_our_names_config_and_steps(run):
    first, second = launches(run)
    run_id = json.loads((run / RUN_FILE).read_text())["id"]
    for kept in (first, second):
        assert kept.run.run_id == run_id and (kept.run.project, kept.run.display_name) == ("other", "tracked")
        assert (kept.run.run_group, list(kept.run.tags)) == ("pairs", ["a", "b"])
        assert kept.config["model"]["hidden_size"] == 64 and kept.config["logging"]["wandb"]["mode"] == "offline"
        assert kept.step_metrics["*"] == "step"
    assert [row["step"] for row in first.history] == [1, 2, 3] and [row["step"] for row in second.history] == [3, 4]
    assert [row["train/loss"] for row in first.history] == pytest.approx([1, 1 / 2, 1 / 3])
    assert {str(row["health/sqk/mean"]).lower() for row in first.history} == {"nan"}


@needs_client
def test_how_a_launch_ended_is_told(run):
    first, second = launches(run)
    assert (first.preempting, first.exit_code) == (True, 1)
    assert (second.preempting, second.exit_code) == (False, 0)


@needs_client
def test_no_code_no_output_and_nothing_secret_is_kept(run):
    kept = [path for path in (run / "wandb").rglob("*") if path.is_file()]
    assert not {path.name for path in kept} & {"diff.patch", "output.log"} and not [path for path in kept if path.suffix == ".py"]
    assert not [path for path in kept if b"secret" in path.read_bytes()]


@needs_client
def test_without_a_key_figures_are_kept_for_later(tmp_path):
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": ""}
    said = launch(tmp_path, "finished", 1, 2, "logging.wandb.mode=online", **environment)
    assert said.count("note: W&B has no run for this one") == 1 and "wandb sync" in said and "key" in said.lower()
    (kept,) = launches(tmp_path / "run")
    assert [row["step"] for row in kept.history] == [1, 2] and kept.exit_code == 0
    assert kept.run.run_id == own_run_id(tmp_path / "run")


@needs_client
def test_what_is_installed_is_accepted():
    check_extras(compose(["experiment=ngpt_tiny", "logging.wandb.mode=online"]))


def test_a_damaged_id_is_no_new_run(tmp_path):
    first = own_run_id(tmp_path)
    assert own_run_id(tmp_path) == first
    (tmp_path / RUN_FILE).write_text("{")
    with pytest.raises(ConfigError, match="remove it, and the next launch begins a new one"):
        own_run_id(tmp_path)
