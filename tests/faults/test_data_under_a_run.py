"""Data that changes under a run, and optimizer keys that a resume cannot change, through real launches."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH_SECONDS = 300


def ngpt(cwd, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.cli", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LAUNCH_SECONDS)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


def prepared(folder, documents, word):
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": f"{word} {i} " * 20}) + "\n" for i in range(documents)))
    done = ngpt(folder, "data", "prepare", "x.jsonl", "--out", "d", "--workers", "1", "--overwrite")
    assert done.returncode == 0, done.stderr


WORDS = ("train.steps=8", "train.eval_steps=0", "optim.lr=1e-2")
TRAIN, CONTROL = ("train", "experiment=ngpt_tiny", *WORDS), ("train", "experiment=gpt_tiny", *WORDS)
DATA = ("data.mock=false", "data.train=[{path: d/train}]")


def losses(folder, name):
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["train_loss"] for row in map(json.loads, lines)}


def test_data_prepared_again_is_refused_on_resume_and_trained_on_when_accepted(tmp_path):
    prepared(tmp_path, 300, "alpha")
    first = ngpt(tmp_path, *TRAIN, *DATA, "run.name=r", "train.stop_after=4")
    assert first.returncode == 0, first.stderr
    prepared(tmp_path, 30, "beta")
    refused = ngpt(tmp_path, *TRAIN, *DATA, "run.name=r")
    assert refused.returncode == 2 and "d/train was prepared again: 272 documents" in refused.stderr
    accepted = ngpt(tmp_path, *TRAIN, *DATA, "run.name=r", "data.accept_changed=true")
    assert accepted.returncode == 0 and "note: d/train (data.train) was prepared again" in accepted.stderr
    assert sorted(losses(tmp_path, "r")) == list(range(1, 9))


def test_a_shared_cache_never_serves_the_samples_of_other_data(tmp_path):
    cache = ("data.cache_dir=cache", "checkpoint=none")
    prepared(tmp_path, 60, "alpha")
    assert ngpt(tmp_path, *TRAIN, *DATA, *cache, "run.name=g1").returncode == 0
    prepared(tmp_path, 300, "alpha")
    assert ngpt(tmp_path, *TRAIN, *DATA, *cache, "run.name=g2").returncode == 0
    assert ngpt(tmp_path, *TRAIN, *DATA, "checkpoint=none", "run.name=g3").returncode == 0
    assert losses(tmp_path, "g2") == losses(tmp_path, "g3") != losses(tmp_path, "g1")


def test_a_truncated_index_is_named_and_the_run_goes_on_with_the_same_samples(tmp_path):
    prepared(tmp_path, 100, "alpha")
    assert ngpt(tmp_path, *TRAIN, *DATA, "run.name=twin").returncode == 0
    assert ngpt(tmp_path, *TRAIN, *DATA, "run.name=r", "train.stop_after=4").returncode == 0
    index = next((tmp_path / "runs/r/data_cache").glob("*shuffle_index.npy"))
    index.write_bytes(index.read_bytes()[:-5])
    resumed = ngpt(tmp_path, *TRAIN, *DATA, "run.name=r")
    assert resumed.returncode == 0
    assert "cached sample index" in resumed.stdout + resumed.stderr and index.name in resumed.stdout + resumed.stderr
    assert losses(tmp_path, "r") == losses(tmp_path, "twin")


def test_launches_that_build_one_cache_entry_at_once_all_read_whole_files(tmp_path):
    """Three processes start together; each must see the same samples, and none a file that another has half written."""
    sys.path.insert(0, str(ROOT / "tests/unit/training"))
    from test_sample_index import make

    prefix = make(tmp_path, "a", 3000)
    text = f"""
import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "tests/unit/training")]!r}
import hashlib
from test_sample_index import build, tokens_of
input()
print(hashlib.sha256(tokens_of(build({str(tmp_path / "cache")!r}, {prefix!r}, samples=4000), 4000).tobytes()).hexdigest())
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", text], **pipes) for _ in range(3)]
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=LAUNCH_SECONDS) for process in running]
    assert all(process.returncode == 0 for process in running), ends
    assert len({out.splitlines()[-1] for out, _ in ends}) == 1
    assert not list((tmp_path / "cache").glob(".building-*"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optim")
    assert ngpt(folder, *TRAIN, "run.name=r", "train.stop_after=4").returncode == 0
    return folder


@pytest.mark.parametrize("key", ["optim.beta1=0.5", "optim.beta2=0.5", "optim.weight_decay=0.1", "parallel.distributed_optimizer=false"])
def test_optimizer_keys_that_the_checkpoint_brings_back_are_refused(stopped, key):
    refused = ngpt(stopped, *TRAIN, "run.name=r", key)
    assert refused.returncode == 2 and f"{key.split('=')[0]}: " in refused.stderr
    assert key not in (stopped / "runs/r/config.yaml").read_text().replace(": ", "=")


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    """A stopped run of the control, whose weights weight decay reaches, and one that went on unchanged."""
    folder = tmp_path_factory.mktemp("gpt")
    assert ngpt(folder, *CONTROL, "run.name=r", "train.stop_after=4").returncode == 0
    shutil.copytree(folder / "runs/r", folder / "runs/same")
    assert ngpt(folder, *CONTROL, "run.name=same").returncode == 0
    return folder


@pytest.mark.parametrize("key", ["optim.clip_grad=1e-3", "optim.weight_decay=5", "optim.lr=2e-3", "schedule=linear"])
def test_what_may_change_takes_effect(gpt, key):
    """Against the run that went on unchanged: the loss after the first resumed step differs, that of the step itself does not."""
    run = "changed_" + key.partition("=")[0].replace(".", "_")
    shutil.copytree(gpt / "runs/r", gpt / "runs" / run)
    override = () if "clip" in key else ("megatron.override_opt_param_scheduler=true",)
    words = [word for word in CONTROL if word.split("=")[0] != key.split("=")[0]]
    done = ngpt(gpt, *words, f"run.name={run}", key, *override)
    assert done.returncode == 0, done.stdout + done.stderr
    same, changed = losses(gpt, "same"), losses(gpt, run)
    assert same[5] == changed[5] and same[7] != changed[7]
    if key.startswith("optim.lr"):
        rows = [json.loads(line) for line in (gpt / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        assert {row["step"]: row["learning_rate"] for row in rows}[6] == pytest.approx(2e-3, rel=1e-6)  # fp32
