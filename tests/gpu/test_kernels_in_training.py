"""Training with the row kernels and without them: 200 steps of a small model on real text lose the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
STEPS = 200
# Relative difference of a step's loss, and of the mean of the last 20. An H200 showed 1.3e-4 and 3.4e-5, 7.6e-4 and
# 1.4e-4; NVFP4 has not run to its end yet: its bounds are guesses.
BOUNDS = {"fp32": (5e-4, 1.5e-4), "bf16": (3e-3, 6e-4), "nvfp4_static": (2e-2, 5e-3)}


def ngpt(*words: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-m", "launch.cli", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """The project's own pages, in bytes."""
    folder = tmp_path_factory.mktemp("text")
    if torch.cuda.is_available():
        pages = sorted([ROOT / "README.md", ROOT / "tests/CLAIMS.md", *(ROOT / "launch").glob("*.md"), *(ROOT / "ngpt").glob("*.md")])
        (folder / "pages.txt").write_bytes(b"\n".join(page.read_bytes() for page in pages))
        ngpt("data", "prepare", str(folder / "pages.txt"), "--out", str(folder), "--documents", "blank-line", "--split", "100,0,0")
    return folder / "train"


@pytest.fixture
def losses(text: Path, tmp_path: Path):
    def train(name: str, *words: str) -> list[float]:
        common = ["data.mock=false", f"data.train=[{{path: {text}}}]", "tokenizer=bytes", f"run.root={tmp_path}", f"run.name={name}"]
        common += [f"train.steps={STEPS}", "train.eval_steps=0", "checkpoint=none", "logging.interval=1", "optim.lr=3e-3"]
        ngpt("train", "experiment=ngpt_tiny", *common, *words)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line["train_loss"] for line in lines if "train_loss" in line]

    return train


@pytest.mark.parametrize("precision", BOUNDS)
def test_losses_with_and_without(losses, precision):
    with_kernels = torch.tensor(losses("with", f"precision={precision}"))
    without = torch.tensor(losses("without", f"precision={precision}", "debug.row_kernels=false"))
    assert len(with_kernels) == len(without) == STEPS
    relative = (with_kernels - without).abs() / without
    of_a_step, of_the_end = BOUNDS[precision]
    print(f"{precision}: {relative.max():.2e} of a step, {with_kernels[-20:].mean() / without[-20:].mean() - 1:.2e} at the end")
    assert with_kernels[-20:].mean() < 0.8 * with_kernels[0]  # it learns: the comparison says something
    assert relative.max() < of_a_step
    assert abs(with_kernels[-20:].mean() / without[-20:].mean() - 1) < of_the_end
