"""Memory and step time as `ngpt estimate` says, over what runs measured.

    python tests/bench/estimate_vs_measured.py RUN_DIR... [--gpu h100]

Reads config.yaml and metrics.jsonl of each run folder: the peak memory, and the median tokens per second without the first logged interval.
"""

import argparse
import json
import statistics
from pathlib import Path

from ngpt.config.compose import load
from ngpt.estimate.memory import estimate_memory
from ngpt.estimate.step_time import estimate_step

_GIB = 2**30


def compare(run: Path, gpu: str | None) -> str:
    """One line: estimated, measured and their ratio, for memory and for the time of a step."""
    cfg = load(run / "config.yaml")
    cfg.cluster.gpu = gpu or cfg.cluster.gpu
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rate = statistics.median([line["tokens_per_second"] for line in lines if "tokens_per_second" in line][1:])
    gib = max(line["memory_gib"] for line in lines if "memory_gib" in line)
    step, estimated_gib = estimate_step(cfg), estimate_memory(cfg).peak / _GIB
    measured_step = step.tokens / rate
    return (
        f"{cfg.run.name} micro-batch {cfg.train.micro_batch_size}: memory {estimated_gib:.2f} / {gib:.2f} GiB = {estimated_gib / gib:.3f}, "
        f"step {step.total:.3f} / {measured_step:.3f} s = {step.total / measured_step:.3f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--gpu", help="name in ngpt/estimate/hardware.py where the config does not say")
    arguments = parser.parse_args()
    for folder in arguments.runs:
        print(compare(folder, arguments.gpu))
