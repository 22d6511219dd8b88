"""Run folders as the trainer leaves them, with figures whose value the tests can work out."""

import json
import math
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ngpt.analysis.metrics import MetricsWriter

TOKENS_PER_STEP = 2048
STEP_SECONDS = 0.25
SCALES = ("attn_alpha", "mlp_alpha", "sqk", "suv", "sz")


def record(step: int, **changes: Any) -> dict[str, Any]:
    figures = {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "train_loss": 1.0 + 4.5 * math.exp(-step / 20),
        "learning_rate": 1e-2,
        "grad_norm": 0.5,
        "tokens_per_second": TOKENS_PER_STEP / STEP_SECONDS,
        "mfu": None,
        "step_time_s": STEP_SECONDS,
        "memory_gib": None,
        "worst_norm_deviation": 1.2e-7,
        "health/hidden_norm/mean": 1.0,
        "health/hidden_norm/min": 1.0 - 1e-7,
        "health/hidden_norm/max": 1.0 + 1e-7,
    }
    if step % 50 == 0:
        figures["val_loss"] = figures["train_loss"] + 0.1
    for number, scale in enumerate(SCALES, start=1):
        figures |= {f"health/{scale}/{part}": number * factor for part, factor in (("min", 0.5), ("mean", 1.0), ("max", 2.0))}
    return figures | changes


def write_run(
    directory: Path,
    records: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
) -> Path:
    """A run of 100 steps logged every 10; without `summary` it has not finished."""
    directory.mkdir(parents=True)
    name, own = directory.name, str(directory)
    base = {
        "run": {"name": name, "dir": own},
        "model": {"architecture": "ngpt", "hidden_size": 64},
        "precision": {"name": "fp32"},
        "optim": {"lr": 1e-2, "clip_grad": 1.0},
        "parallel": {"tensor": 1, "pipeline": 1},
        "checkpoint": {"dir": f"{own}/checkpoints"},
        "train": {"steps": 100},
        "debug": {"norm_tolerance": 1e-4},
        "megatron": {},
    }
    OmegaConf.save(OmegaConf.merge(base, config or {}), directory / "config.yaml")
    with MetricsWriter(directory / "metrics.jsonl") as writer:
        for line in [record(step) for step in range(10, 101, 10)] if records is None else records:
            writer.write(line)
    environment = {"command": "ngpt train", "git": {"commit": "0123abcd", "dirty": True}, "versions": {"torch": "2.11.0"}}
    (directory / "environment.json").write_text(json.dumps(environment))
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def summary(**changes: Any) -> dict[str, Any]:
    figures = {
        "steps": 100,
        "tokens": 204_800,
        "wall_time_s": 3725.0,
        "train_loss": 1.03,
        "val_loss": 1.1303,
        "tokens_per_second": 8192.0,
        "parameters": 1_642_514,
        "status": "finished",
        "val_bits_per_byte": 1.6307,
        "unigram_bits_per_byte": 4.8732,
        "bigram_bits_per_byte": 3.7121,
    }
    return figures | changes
