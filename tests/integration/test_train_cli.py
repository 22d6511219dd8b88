"""The product as a user runs it: `ngpt data prepare`, `ngpt train` stopped and resumed, `ngpt sample`, `ngpt report`, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from torchrun import ngpt

from tests.unit.trackers.wandb_launches import launches, needs_client

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_SECONDS = 600  # a hang ends here; no statement about speed


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder outside the repository with prepared text: this project's own sources, a document a file."""
    folder = tmp_path_factory.mktemp("workplace")
    documents = [{"text": path.read_text()} for path in sorted((ROOT / "ngpt").rglob("*.py")) if path.stat().st_size]
    (folder / "code.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    done = ngpt("data", "prepare", "code.jsonl", "--out", "tokens", "--split", "80,20,0", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


TRAIN = [
    "train",
    "experiment=ngpt_tiny",
    "data=enwik8_bytes",
    "data.train=[{path: tokens/train}]",
    "data.valid=[{path: tokens/valid}]",
    "data.confine_attention=true",
    "data.num_workers=1",
    "checkpoint.interval=2",
    "megatron.log_params_norm=true",
    "run.name=cli",
]
TRACKED = ["logging.wandb.mode=offline"] if find_spec("wandb") else []


@pytest.fixture(scope="module")
def run(workplace) -> Path:
    """A run saved asynchronously after step 2, stopped after step 3, robbed of its last checkpoint, and resumed on two processes."""
    folder = workplace / "runs" / "cli"
    first = ngpt(*TRAIN, *TRACKED, "checkpoint.async_save=true", "debug=profile", "debug.profile_start=1", "debug.profile_stop=2",
                 "train.stop_after=3", cwd=workplace)  # fmt: skip
    assert first.returncode == 0, first.stdout + first.stderr
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]
    shutil.rmtree(folder / "checkpoints" / "iter_0000003")
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    second = ngpt(*TRAIN, *TRACKED, "parallel=tp2", "cluster.gpus_per_node=2", cwd=workplace)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "step 4/4" in second.stdout
    return folder


def test_steps_after_the_checkpoint_are_superseded_not_doubled(run):
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    assert (run / "logs" / "megatron-rank0.log").read_text().count("successfully loaded checkpoint") == 1


def test_run_folder_tells_the_whole_story(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 4 and summary["tokens"] == 4 * 8 * 32
    assert {"train_loss", "val_loss", "wall_time_s", "val_bits_per_byte", "unigram_bits_per_byte", "bigram_bits_per_byte"} <= summary.keys()
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["megatron-core"] == "0.19.2" and "git" in environment
    assert "parallel" in (run / "config.yaml").read_text() and (run / "console.log").stat().st_size
    assert list((run / "torch_profile").glob("rank-0*"))


def test_metrics_have_the_promised_figures(run):
    last = rows(run)[-1]
    promised = {
        "step",
        "tokens",
        "train_loss",
        "val_loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "step_time_s",
        "memory_gib",
        "memory_reserved_gib",
        "allocation_retries",
        "tflops_per_gpu",
    }
    assert promised <= last.keys()
    assert last["mfu"] is None  # no GPU, no peak
    assert last["tokens_per_second"] == pytest.approx(8 * 32 / last["step_time_s"])


def test_tensorboard_holds_the_same_figures_once_a_step(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for tag, name in {"train/loss": "train_loss", "train/grad_norm": "grad_norm", "train/learning_rate": "learning_rate"}.items():
        assert [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)] == [
            (row["step"], row[name]) for row in rows(run)
        ]


def test_tensorboard_has_groups_the_config_and_what_was_asked_for(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {tag.partition("/")[0] for tag in tags} == {"train", "valid", "health", "megatron"}
    assert {"valid/loss", "train/memory_gib", "train/tflops_per_gpu", "health/worst_norm_deviation"} <= set(tags)
    assert [tag for tag in tags if tag.startswith("megatron/")] == ["megatron/params-norm"]
    assert [event.value > 0 for event in events.Scalars("megatron/params-norm")] == [True] * 4
    assert events.Tags()["tensors"] == ["config/text_summary"]
    assert b"hidden_size: 64" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@needs_client
def test_launches_of_a_run_folder_are_one_run_of_wandb(run):
    first, second = launches(run)
    assert first.run.run_id == second.run.run_id and (first.exit_code, second.exit_code) == (0, 0)
    losses = {row["step"]: row["train_loss"] for row in rows(run)}
    assert [row["step"] for row in first.history] == [1, 2, 3] and [row["step"] for row in second.history] == [3, 4]
    assert {row["step"]: row["train/loss"] for row in [*first.history, *second.history]} == pytest.approx(losses)
    assert all(row["megatron/params-norm"] > 0 for row in first.history)


def test_report_and_sample(run, workplace):
    report = ngpt("report", "runs/cli", cwd=workplace)
    assert report.returncode == 0, report.stderr
    page = (run / "report" / "index.html").read_text()
    assert "cli" in page and "<svg" in page
    assert 'id="health"' in page  # of step 1: the run is shorter than an interval
    sample = ngpt("sample", "runs/cli", "--prompt", "def ", "--tokens", "5", cwd=workplace)
    assert sample.returncode == 0, sample.stderr
    assert sample.stdout.startswith("def ") and (run / "sample.txt").read_text().startswith("def ")


def test_another_model_in_the_same_run_folder_is_refused_with_the_difference(run, workplace):
    refused = ngpt(*TRAIN, "model.hidden_size=128", cwd=workplace)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "model.hidden_size: 64 -> 128" in refused.stderr


def test_weights_of_another_model_are_refused(run, workplace):
    refused = ngpt(*TRAIN, "run.name=other", "model.ffn_hidden_size=96", "checkpoint.load=runs/cli/checkpoints", cwd=workplace)
    assert refused.returncode == 2 and "model.ffn_hidden_size: 160 -> 96" in refused.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["checkpoint.load=nowhere"], "checkpoint.load: nowhere"),
        (["megatron.no_such_argument=1"], "megatron.no_such_argument"),
        (["model.transformer_impl=transformer_engine"], "model.transformer_impl"),
    ],
)
def test_errors_that_only_the_workers_can_see_end_in_one_clear_line(workplace, overrides, words):
    failed = ngpt("train", "experiment=ngpt_tiny", "run.name=bad", *overrides, cwd=workplace)
    assert failed.returncode == 2, failed.stderr
    assert words in failed.stdout + failed.stderr and "Traceback" not in failed.stdout + failed.stderr


def test_changed_data_is_refused(workplace):
    copy = workplace / "changed"
    shutil.copytree(workplace / "tokens", copy)
    with (copy / "train.bin").open("r+b") as stream:
        stream.write(b"\x00\x01\x02\x03")
    refused = ngpt(*TRAIN, "run.name=changed", "data.train=[{path: changed/train}]", cwd=workplace)
    assert refused.returncode == 2 and "changed since its preparation" in refused.stderr


def test_the_first_ctrl_c_saves_and_the_same_command_continues(workplace):
    words = ["experiment=ngpt_tiny", "cluster.gpus_per_node=2", "run.name=interrupted", "train.steps=100000"]
    command = [sys.executable, "-m", "launch.cli", "train", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    folder = workplace / "runs" / "interrupted"
    process = subprocess.Popen(command, cwd=workplace, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step") and line.split("/")[0].split()[-1] == "3":
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate(timeout=LAUNCH_SECONDS)[0]
    assert process.returncode == 75 and "Traceback" not in rest
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "stopped" and f"stopped after step {summary['steps']}" in rest
    assert int((folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()) == summary["steps"]


def test_a_finished_run_is_left_as_it_is(run, workplace):
    before = {path: path.read_bytes() for path in (run / "summary.json", run / "metrics.jsonl", run / "config.yaml")}
    again = ngpt(*TRAIN, "parallel=tp2", "cluster.gpus_per_node=2", cwd=workplace)
    assert again.returncode == 0 and "nothing to train" in again.stdout
    assert {path: path.read_bytes() for path in before} == before
