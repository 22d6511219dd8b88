"""A folder with text, tasks, a run and its export, for all tests of evaluation. They run where lm-eval is installed: `make test-eval`."""

import json
import random
from pathlib import Path

import pytest
from evaluated import WORDS, ngpt, training, write_tasks


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """`data/small` in bytes, `tasks`, the run `runs/hybrid` (Mamba, experts, attention; 20 steps) and its export `exported`."""
    folder = tmp_path_factory.mktemp("evaluated")
    rng = random.Random(7)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randrange(5, 60)))}) for _ in range(400)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    ngpt("data", "prepare", "text.jsonl", "--out", "data/small", "--tokenizer", "bytes", "--split", "80,20,0", "--workers", "1", cwd=folder)
    write_tasks(folder / "tasks")
    ngpt("train", *training("ngpt_hybrid_tiny"), "run.name=hybrid", "train.steps=20", "checkpoint=at_end", cwd=folder)
    ngpt("export", "runs/hybrid", "--out", "exported", "--parity", "none", cwd=folder)
    return folder
