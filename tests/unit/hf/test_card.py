"""The model card of an export, read as text."""

import json
import re

import pytest
import yaml

from ngpt.config.compose import compose
from ngpt.config.schema import DataSource, TokenizerConfig
from ngpt.data.plan import Options
from ngpt.data.prepare import prepare
from ngpt.hf.card import write_card

LOGGED = [
    {"step": 10, "train_loss": 3.0, "val_loss": 2.0},
    {"step": 20, "train_loss": 2.5, "val_loss": None},
    {"step": 30, "train_loss": None, "nonfinite": ["train_loss"]},
    {"step": 40, "train_loss": 1.0, "val_loss": 0.5},
]
LAUNCH = {
    "command": "ngpt train run.root=/home/someone/runs",
    "git": {"commit": "0123abc", "dirty": True},
    "versions": {"torch": "2.11.0", "triton": None},
    "gpus": ["NVIDIA B200"] * 8,
}


def card(tmp_path, overrides=("experiment=ngpt_tiny",), step=30, parity=None, remote_code=True, tokenizer=True, **sections):
    cfg = compose([*overrides, f"run.root={tmp_path}/runs"])
    for name, fields in sections.items():
        for key, value in fields.items():
            setattr(getattr(cfg, name), key, value)
    run_dir = tmp_path / "runs" / cfg.run.name
    return write_card(tmp_path, cfg, step, "torch.bfloat16", parity, run_dir, remote_code, tokenizer).read_text(encoding="utf-8")


def run_folder(tmp_path, name="ngpt_tiny"):
    folder = tmp_path / "runs" / name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in LOGGED))
    (folder / "environment.json").write_text(json.dumps(LAUNCH))
    return folder


def rows(text):
    return dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("experiment", "remote_code"),
    [("ngpt_tiny", True), ("gpt_tiny", False), ("ngpt_hybrid_tiny", True), ("gpt_hybrid_tiny", False), ("ngpt_hybrid_3b30b_nvfp4", True)],
)
def test_every_row_of_every_model_says_something(experiment, remote_code, tmp_path):
    text = card(tmp_path, [f"experiment={experiment}"], remote_code=remote_code)
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    settings = yaml.safe_load(front)
    assert (settings["library_name"], settings["pipeline_tag"]) == ("transformers", "text-generation")
    assert "license" not in settings and len(set(settings["tags"])) == len(settings["tags"])
    assert ("custom_code" in settings["tags"]) == ("trust_remote_code" in body) == remote_code
    table = [line for line in body.splitlines() if line.startswith("|") and line not in ("| | |", "|---|---|")]
    assert len(table) > 15 and all(re.fullmatch(r"\| [^|\s][^|]* \| [^|\s][^|]* \|", line) for line in table), table
    assert not re.search(r"None|null|nan|\{\{|\{%|\n\n\n", body)
    assert ("retract_()" in body) == experiment.startswith("ngpt")
    assert ("does not serve it" in body) == (experiment.startswith("ngpt_hybrid"))
    assert str(tmp_path) not in text and "/home" not in text


def test_without_a_tokenizer_the_card_opens_none(tmp_path):
    with_one, without = card(tmp_path), card(tmp_path, tokenizer=False)
    assert "AutoTokenizer" in with_one and "AutoTokenizer" not in without
    assert "The tokenizer is not in this folder." in without and "\n\n\n" not in without


def test_results_are_those_at_the_exported_step(tmp_path):
    run_folder(tmp_path)
    found = rows(card(tmp_path, step=30))
    assert found["Training loss"] == "2.5000 nats per token, step 20"
    assert found["Validation loss"] == "2.0000 nats per token, step 10"
    assert found["Checkpoint"] == "step 30" and found["Weights"] == "BF16"
    assert found["Commit"] == "`0123abc`, with changes that are not committed"
    assert found["Versions"] == "torch 2.11.0" and found["GPUs of a node"] == "8 NVIDIA B200"


def test_a_run_without_its_files_has_no_such_sections(tmp_path):
    text = card(tmp_path)
    assert "## Results" not in text and "## Origin" not in text
    (run_folder(tmp_path) / "metrics.jsonl").write_text("{damaged\n")
    (tmp_path / "runs" / "ngpt_tiny" / "environment.json").write_text("[1")
    assert "## Results" not in card(tmp_path) and "## Origin" not in card(tmp_path)


def test_data_is_named_without_the_machine_and_losses_count_bytes(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"größe {i} of the norm" for i in range(400)))
    tokenizer = TokenizerConfig(name="bytes", kind="bytes")
    manifest = prepare([texts], tmp_path / "corpus", tokenizer, Options(split="80,10,10", documents="blank-line"), workers=1)
    run_folder(tmp_path)
    train, valid = (DataSource(str(tmp_path / "corpus" / split)) for split in ("train", "valid"))
    text = card(tmp_path, data={"train": [train], "valid": [valid], "mock": False})
    split = manifest.splits["valid"]
    bits = 2.0 / 0.6931471805599453 * split.tokens / split.bytes_of_text
    assert f"| Validation loss | {bits:.4f} bits per byte, step 10 |" in text
    assert f"`corpus/train`, {manifest.splits['train'].tokens:,}" in rows(text)["Training data"]
    assert rows(text)["Tokenizer"] == "bytes, 257 entries"
    assert str(tmp_path) not in text
    blend = card(tmp_path, data={"train": [DataSource(train.path, 3.0), DataSource("/gone/with/train", 1.0)], "mock": False})
    assert "75.0% of the blend" in blend and "`with/train`, 25.0% of the blend" in blend and "/gone" not in blend


@pytest.mark.parametrize("parity", [None, "they agree on 512 tokens"])
def test_the_comparison_is_what_the_caller_found(parity, tmp_path):
    assert rows(card(tmp_path, parity=parity))["Comparison with the trained model"] == (parity or "not run")


def test_precision_schedule_and_layout_say_what_was_run(tmp_path):
    overrides = ["experiment=ngpt_1p2b_dense_nvfp4", "cluster.nodes=2", "cluster.gpus_per_node=8", "parallel.tensor=2"]
    overrides += ["schedule.warmup_steps=100", "optim.weight_decay=0.1", "precision.num_layers_at_end_in_bf16=2"]
    found = rows(card(tmp_path, overrides, step=158946))
    assert found["Precision"].startswith("recipe nvfp4_paper, NVFP4 on BF16; without NVFP4: last 2 blocks")
    assert found["Layout"] == "16 processes on 2 nodes, tensor parallel 2, data parallel 8"
    assert "0.0003, after 100 steps of warm-up, constant, with a decay to 1.2e-05 over the last 15%" in found["Learning rate"]
    assert "weight decay 0.1" in found["Optimizer"] and found["Steps"] == "158,946"
