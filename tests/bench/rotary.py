"""Queries, keys and values from mixed heads on a GPU: the kernels against the card's copy bandwidth, beside what ran before.

    python tests/bench/rotary.py --out FOLDER [--sweep]

Refuses to measure where tests/gpu/test_rotary.py is red. Bytes, bf16: forward the mixed heads are read and written; backward three
gradients are read and one is written, and nGPT reads queries and keys once more. Numbers a head and parts of the scale's gradient are not
counted. Copy bandwidth counts read and written bytes. Times are medians over replays of a CUDA graph; "before" is split, Transformer
Engine's fused rotation, norms, and copies of values, and backward the concatenation. --sweep tries other tilings first.

Prediction, written before measuring, for the dense model (16,384 tokens, 16 heads and 4 groups of 128): 201 MB forward at 85 % of copy,
285 MB backward at 75 %, partials and angles being another 7 %. Of 4.2 TB/s: 56 and 91 us.
"""

import argparse
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench_tools import copy_bandwidth, median_seconds_in_graph, write_results
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ngpt.kernels.normalize import triton as norms
from ngpt.kernels.rotary import triton as kernels

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "kernels"))
from rotary_cases import Case, Inputs, make_inputs  # noqa: E402

CALLS, REPLAYS = 8, 9
FACTOR = 1.7  # that stored scales are multiplied with
TESTS = Path(__file__).parents[1] / "gpu" / "test_rotary.py"
DENSE = Case(16, 4, 128, 128, sequence=8192, batch=2)
CASES = {
    "ngpt 1.2B": DENSE,
    "control 1.2B": dataclasses.replace(DENSE, is_scaled=False),
    "ngpt 1.2B, one sequence": dataclasses.replace(DENSE, batch=1),
    "ngpt hybrid": Case(32, 2, 128, 0, sequence=8192, batch=1),
    "control hybrid": Case(32, 2, 128, 0, False, sequence=8192, batch=1),
}
Passes = tuple[Callable[[], object], Callable[[], object]]  # forward, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]).returncode:
        sys.exit("The kernels are wrong here: nothing is measured.")
    copy = copy_bandwidth() * 1e9
    print(f"copy {copy / 1e9:.0f} GB/s")
    if options.sweep:
        for name in ("ngpt 1.2B", "control 1.2B", "ngpt hybrid"):
            sweep(name, copy)
    tilings = {"forward": str(kernels.FORWARD), "backward": str(kernels.BACKWARD)}
    rows = [row | {"tilings": tilings} for name, case in CASES.items() for row in measure(name, case, copy)]
    write_results(options.out, "rotary", copy, rows)


def inputs_of(case: Case) -> list[Inputs]:
    """Several, in turn: none is found in L2."""
    return [make_inputs(case, torch.bfloat16, torch.Generator("cuda").manual_seed(seed)) for seed in range(3)]


def bytes_moved(case: Case, backward: bool) -> int:
    again = (case.heads + case.groups) * (backward and case.is_scaled)
    return 2 * case.sequence * case.batch * case.width * (2 * (case.heads + 2 * case.groups) + again)


def ours(x: Inputs) -> Passes:
    arguments = x.angles, x.scale, FACTOR
    inverse_norms = kernels.forward(x.mixed, x.heads, x.groups, *arguments)[3]
    kept = None if x.scale is None else x.mixed
    return (
        lambda: kernels.forward(x.mixed, x.heads, x.groups, *arguments),
        lambda: kernels.backward(x.grads, kept, *arguments, inverse_norms),
    )


def rotation(angles: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Transformer Engine's fused one."""
    if angles is None:
        return lambda heads: heads
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    return lambda heads: apply_rotary_pos_emb(heads, angles, tensor_format="sbhd", fused=True)


def before(x: Inputs) -> Passes:
    """What ran before, kernel by kernel, but for the product with the scale, which the norm of the queries did on the way."""
    each, width, heads = x.heads // x.groups, x.grads[0].size(-1), x.heads
    turn, turn_back = rotation(x.angles), rotation(None if x.angles is None else -x.angles)  # the gradient turns back

    def forward() -> tuple[Tensor, ...]:
        q, k, v = x.mixed.unflatten(-1, (x.groups, -1)).split((each * width, width, width), -1)
        q, k = turn(q.reshape(*q.shape[:2], heads, width)), turn(k)
        if x.scale is None:
            return q, k.contiguous(), v.contiguous()
        (y, inverse_q), (z, inverse_k) = norms.l2_forward(q, -1, None), norms.l2_forward(k, -1, None)
        return y, z, v.contiguous(), q, k, inverse_q, inverse_k

    saved = forward()[3:]

    def backward() -> Tensor:
        grad_q, grad_k, grad_v = x.grads
        if x.scale is not None:
            q, k, inverse_q, inverse_k = saved
            grad_q = norms.l2_backward(grad_q, q, inverse_q, -1, None)
            grad_k = norms.l2_backward(grad_k, k, inverse_k, -1, None)
        grad_q, grad_k = turn_back(grad_q), turn_back(grad_k)
        return torch.cat((grad_q.view(*grad_k.shape[:3], each * width), grad_k, grad_v), -1)

    return forward, backward


def seconds(passes: list[Passes], backward: bool) -> float:
    works = [both[backward] for both in passes]
    return median_seconds_in_graph(lambda i: works[i % len(works)](), CALLS, REPLAYS, kept=len(works))


def measure(name: str, case: Case, copy: float) -> list[dict]:
    """Forward and backward pass, and what ran before them."""
    inputs, rows = inputs_of(case), []
    for backward in (False, True):
        moved, took = bytes_moved(case, backward), seconds([ours(x) for x in inputs], backward)
        row = dict(case=name, bytes_moved=moved, median_us=took * 1e6, share_of_copy=moved / took / copy)
        row["pass"] = "backward" if backward else "forward"
        row["before_us"] = seconds([before(x) for x in inputs], backward) * 1e6
        rows.append(row)
        beside = f"before {row['before_us']:8.1f} us"
        print(f"{name:24s} {row['pass']:9s}{took * 1e6:8.1f} us  {100 * row['share_of_copy']:5.1f} % of copy  {beside}", flush=True)
    return rows


def sweep(name: str, copy: float) -> None:
    """Try tilings of both passes and print the best; what is measured afterwards has those of the module again."""
    case, inputs = CASES[name], inputs_of(CASES[name])
    for backward, tiling in ((False, "FORWARD"), (True, "BACKWARD")):
        shipped, found = getattr(kernels, tiling), []
        for warps, elements, resident, stages in itertools.product((2, 4, 8), (4, 8), (24,), (1, 2, 3)):
            choice = dataclasses.replace(shipped, warps=warps, elements=elements, resident=resident, stages=stages)
            setattr(kernels, tiling, choice)
            try:
                took = seconds([ours(x) for x in inputs], backward)
            except OutOfResources:
                continue
            found.append((bytes_moved(case, backward) / took / copy, choice))
        setattr(kernels, tiling, shipped)
        found.sort(key=lambda one: -one[0])
        for share, choice in found[:6]:
            print(f"{name} {tiling} {100 * share:5.1f} % of copy: {choice}", flush=True)


if __name__ == "__main__":
    main()
