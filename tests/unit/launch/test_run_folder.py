"""The run folder: what it records, what it refuses, what it keeps of earlier launches."""

import json
import subprocess

import pytest

from launch.provenance import git_state
from launch.run_folder import check_resumable, first_failure, record_failure, record_launch
from ngpt.config.compose import compose, load
from ngpt.config.errors import ConfigError

COMMAND = ["ngpt", "train", "experiment=ngpt_tiny", "run.name=a b"]


@pytest.fixture
def make_config(tmp_path):
    return lambda *overrides: compose(["experiment=ngpt_tiny", f"run.dir={tmp_path / 'run'}", *overrides])


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_records_config_code_versions_and_command(make_config):
    config = make_config()
    path = record_launch(config, COMMAND, {"OMP_NUM_THREADS": "2"})
    assert load(path) == config
    recorded = json.loads((path.parent / "environment.json").read_text())
    assert recorded["command"] == "ngpt train experiment=ngpt_tiny 'run.name=a b'"
    assert recorded["versions"]["megatron-core"] == "0.19.2"
    assert recorded["versions"]["torch"].startswith("2.11")
    assert recorded["environment"] == {"OMP_NUM_THREADS": "2"}
    assert {"git", "python", "platform", "gpus", "started"} <= set(recorded)


def test_code_state_is_that_of_git(tmp_path):
    git(tmp_path, "init", "--initial-branch", "topic")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--message", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == ({"commit": commit, "branch": "topic", "dirty": False, "untracked": []}, "")
    (tmp_path / "code.py").write_text("a = 2\n")
    (tmp_path / "new.py").write_text("")
    state, diff = git_state(tmp_path)
    assert state == {"commit": commit, "branch": "topic", "dirty": True, "untracked": ["new.py"]}
    assert "-a = 1\n+a = 2\n" in diff


def test_installed_code_has_no_git_state(tmp_path):
    assert git_state(tmp_path) == (None, "")


def test_the_same_model_resumes_with_a_longer_schedule(make_config):
    record_launch(make_config(), COMMAND, {})
    check_resumable(make_config("train.steps=77", "precision=bf16"))


def test_another_model_is_refused_with_both_values(make_config):
    record_launch(make_config(), COMMAND, {})
    with pytest.raises(ConfigError, match="model.ffn_hidden_size: 160 -> 192") as refusal:
        check_resumable(make_config("model.ffn_hidden_size=192"))
    assert refusal.value.path == "run.dir"
    assert "run.name" in str(refusal.value)


def test_an_earlier_launch_is_kept(make_config):
    first = make_config()
    path = record_launch(first, COMMAND, {})
    record_launch(make_config("train.steps=77"), COMMAND, {})
    record_launch(make_config("train.steps=78"), COMMAND, {})
    assert load(path).train.steps == 78
    kept = path.parent / "launches"
    assert sorted(folder.name for folder in kept.iterdir()) == ["001", "002"]
    assert load(kept / "001" / "config.yaml").train.steps == first.train.steps
    assert (kept / "001" / "environment.json").exists()


def test_the_first_failure_is_the_cause_and_a_new_launch_forgets_it(make_config):
    folder = record_launch(make_config(), COMMAND, {}).parent
    record_failure(folder, 0, RuntimeError("connection reset"), time=20.0)
    record_failure(folder, 3, ValueError("loss is NaN"), time=10.0)
    assert first_failure(folder) == {"rank": 3, "time": 10.0, "error": "ValueError", "message": "loss is NaN"}
    record_launch(make_config(), COMMAND, {})
    assert first_failure(folder) is None
