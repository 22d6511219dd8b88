"""Whether what a product multiplies decides how long it takes: the same products of random operands as nGPT and its control have them.

    python tests/bench/power.py [--seconds 4] [--out FILE]

Products of the dense 1.2B at micro-batch 2. Each kind of operands runs for some seconds on end, in three interleaved rounds; clock and
power are what nvidia-smi says meanwhile. A card at its power limit lowers its clock, and its power depends on how many bits change from
one multiplication to the next.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_tools import environment
from step import clocks, sampled
from torch import Tensor
from torch.nn import functional as F

TOKENS, HIDDEN, FFN, VOCABULARY = 16384, 2048, 6144, 131072
SHAPES = {"qkv": (HIDDEN, 3072), "fc1": (HIDDEN, FFN), "fc2": (FFN, HIDDEN), "logits": (HIDDEN, VOCABULARY)}


def gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda")


def control(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Normalised hidden states, or squared ReLUs of them, by weights of standard deviation 0.02."""
    hidden = gaussian(TOKENS, rows)
    return (hidden if rows == HIDDEN else F.relu(hidden) ** 2), gaussian(rows, columns) * 0.02


def ngpt(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Unit rows by unit weights; squared ReLUs of uniform-variance units in front of fc2."""
    hidden = gaussian(TOKENS, rows)
    hidden = F.normalize(hidden if rows == HIDDEN else F.relu(hidden) ** 2, dim=1)
    return hidden, F.normalize(gaussian(rows, columns), dim=0)


def shared_direction(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """As nGPT's, with hidden states that have half of their length in common: what training makes of them."""
    hidden, weight = ngpt(rows, columns)
    return F.normalize(hidden + F.normalize(gaussian(1, rows), dim=1), dim=1), weight


def constant(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """No bit changes."""
    return torch.ones(TOKENS, rows, device="cuda"), torch.ones(rows, columns, device="cuda")


KINDS: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "control": control, "nGPT": ngpt, "nGPT, shared direction": shared_direction, "ones": constant,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for name, (rows, columns) in SHAPES.items():
        operands = {kind: tuple(operand.bfloat16() for operand in make(rows, columns)) for kind, make in KINDS.items()}
        measured: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(options.rounds):
            for kind, (a, b) in operands.items():
                measured[kind].append(one_load(a, b, options.seconds))
        for kind, found in measured.items():
            row = {key: statistics.median(one[key] for one in found) for key in found[0]}
            results.append({"product": name, "operands": kind} | row)
            print(f"{name:8s} {kind:24s} " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(environment() | {"results": results}, indent=1) + "\n")


def one_load(a: Tensor, b: Tensor, seconds: float) -> dict[str, float]:
    """Milliseconds of a product that runs for so long, with the clock and the power meanwhile."""
    out = torch.empty(a.size(0), b.size(1), device="cuda", dtype=a.dtype)
    with tempfile.TemporaryDirectory() as folder, sampled(Path(folder) / "clocks.csv"):
        calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(20):
                torch.mm(a, b, out=out)
            torch.cuda.synchronize()
            calls += 20
        took = time.perf_counter() - began
        return {"ms": 1e3 * took / calls} | clocks(Path(folder) / "clocks.csv")


if __name__ == "__main__":
    main()
