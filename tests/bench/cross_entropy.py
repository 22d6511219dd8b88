"""The cross entropy on a GPU: its kernels against the card's copy bandwidth, beside Megatron's compiled one.

    python tests/bench/cross_entropy.py --out FOLDER [--tokens 16384] [--vocabulary 131072] [--sweep]

Refuses to measure where tests/gpu/test_cross_entropy.py is red. Bytes: bf16 logits are read forward; backward they are read, and their
gradient is written. Copy bandwidth counts read and written bytes. Times are medians over replays of a CUDA graph. --sweep tries other
tilings first.

Prediction, written before measuring: 12.9 GB for 16,384 x 131,072; forward 85 % of copy, backward 90 %, so 5.0 ms of 4.4 at copy speed.
"""

import argparse
import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import torch
from bench_tools import copy_bandwidth, median_ms, median_seconds_in_graph, write_results
from triton.runtime.errors import OutOfResources

from ngpt.kernels.cross_entropy import triton as kernels

CALLS, REPLAYS = 4, 7
TESTS = Path(__file__).parents[1] / "gpu" / "test_cross_entropy.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]).returncode:
        sys.exit("The kernels are wrong here: nothing is measured.")
    copy = copy_bandwidth() * 1e9
    print(f"copy {copy / 1e9:.0f} GB/s, {options.tokens} x {options.vocabulary} bf16")
    logits = torch.randn(options.tokens, options.vocabulary, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(options.vocabulary, (options.tokens,), device="cuda")
    if options.sweep:
        sweep(logits, targets, copy)
    rows = [row(name, moved, seconds, copy) for name, moved, seconds in measure(logits, targets)]
    tilings = {"forward": str(kernels.FORWARD), "rows": kernels.ROWS, "backward": str(kernels.BACKWARD)}
    rows = [result | {"tilings": tilings} for result in rows]
    rows.append(upstream(logits, targets))
    for result in rows:
        share = f"  {100 * result['share_of_copy']:5.1f} % of copy" if "share_of_copy" in result else ""
        print(f"{result['case']:32s} {result['median_us'] / 1e3:8.3f} ms{share}")
    write_results(options.out, "cross_entropy", copy, rows)


def calls(logits: torch.Tensor, targets: torch.Tensor, is_scaled: bool) -> list:
    """Forward and backward pass; the second works on what the first call of it made of the logits, which costs the same."""
    scale = torch.ones(logits.size(1), device="cuda") if is_scaled else None
    largest, total, _ = kernels.forward(logits, scale, 1.0, targets, logits.size(1))
    grad = torch.ones(logits.size(0), device="cuda")
    return [
        lambda i: kernels.forward(logits, scale, 1.0, targets, logits.size(1)),
        lambda i: kernels.backward_(grad, logits, scale, 1.0, targets, logits.size(1), largest, total, None),
    ]


def measure(logits: torch.Tensor, targets: torch.Tensor):
    """(name, bytes moved, seconds) of each pass, with sz and without."""
    size = logits.numel() * logits.element_size()
    for is_scaled in (True, False):
        for name, moved, call in zip(("forward", "backward"), (size, 2 * size), calls(logits, targets, is_scaled), strict=True):
            yield f"{name}, {'with' if is_scaled else 'without'} sz", moved, median_seconds_in_graph(call, CALLS, REPLAYS)


def row(name: str, moved: int, seconds: float, copy: float) -> dict:
    return dict(case=name, bytes_moved=moved, median_us=seconds * 1e6, share_of_copy=moved / seconds / copy)


def upstream(logits: torch.Tensor, targets: torch.Tensor) -> dict:
    """Megatron's compiled cross entropy of one sequence, both passes, without sz."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    torch.distributed.init_process_group("nccl", init_method="tcp://127.0.0.1:29571", rank=0, world_size=1)
    group, x = torch.distributed.group.WORLD, logits[:, None].detach().requires_grad_()

    def both() -> None:
        x.grad = None
        fused_vocab_parallel_cross_entropy(x, targets[:, None], group).sum().backward()

    milliseconds = median_ms(both, repeats=5, warm_up=3)
    torch.distributed.destroy_process_group()
    return dict(case="megatron-core, both, without sz", median_us=milliseconds * 1e3)


def sweep(logits: torch.Tensor, targets: torch.Tensor, copy: float) -> None:
    """Try tilings of both passes with sz and print the best; what is measured afterwards has those of the module again."""
    size = logits.numel() * logits.element_size()
    axes = (4, 8), (16, 32, 64), (1, 3)  # warps, elements, stages
    forward = [dict(rows=rows, warps=w, elements=e, stages=s) for rows, w, e, s in itertools.product((2, 4, 8), *axes)]
    backward = [dict(resident=most, warps=w, elements=e, stages=s) for most, w, e, s in itertools.product((16, 32, 64), *axes)]
    for name, place, moved, choices in (("FORWARD", 0, size, forward), ("BACKWARD", 1, 2 * size, backward)):
        found, shipped, rows = [], getattr(kernels, name), kernels.ROWS
        for choice in choices:
            set_tiling(name, choice)
            try:
                call = calls(logits, targets, True)[place]
                found.append((moved / median_ms(lambda call=call: call(0), repeats=3, warm_up=1) / 1e-3 / copy, choice))
            except OutOfResources:
                continue
        found.sort(key=lambda one: -one[0])
        for share, choice in found[:6]:
            print(f"{name} {100 * share:5.1f} % of copy: {choice}", flush=True)
        setattr(kernels, name, shipped)
        kernels.ROWS = rows


def set_tiling(name: str, choice: dict[str, int]) -> None:
    choice = dict(choice)
    kernels.ROWS = choice.pop("rows", kernels.ROWS)
    setattr(kernels, name, dataclasses.replace(getattr(kernels, name), **choice))


if __name__ == "__main__":
    main()
