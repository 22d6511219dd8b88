"""Measure the row-wise kernels (normalisations, residual step, scales, activations) on a GPU against its copy bandwidth.

    python tests/bench/row_kernels.py [--out FOLDER] [--cases TEXT] [--sweep]        one GPU, plain torch and triton

Refuses to measure where tests/gpu/test_row_kernels.py is red, which checks these very cases. Times are medians over replays of a CUDA
graph, so without launch overhead, for the eager backend too; inputs and outputs rotate, so that none is found in L2. Bytes: inputs read
once, outputs written once; sums of parts of a scale's gradient are not counted. --sweep instead tries other tilings and prints the best
ones.
"""

import argparse
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_tools import copy_bandwidth, median_seconds_in_graph, write_results
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ngpt.config.activations import ACTIVATIONS as TABLE
from ngpt.kernels.activation import Form
from ngpt.kernels.activation import eager as activation_eager
from ngpt.kernels.activation import triton as activation_triton
from ngpt.kernels.normalize import eager as normalize_eager
from ngpt.kernels.normalize import triton as normalize_triton
from ngpt.kernels.rows import Tiling
from ngpt.kernels.scale import eager as scale_eager
from ngpt.kernels.scale import triton as scale_triton

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("unit/kernels", "numerics")]
from row_cases import ACTIVATIONS, make_inputs  # noqa: E402

DEVICE = "cuda"
CALLS, REPLAYS = 8, 9
FACTOR = 1.7  # that stored scales are multiplied with
TILINGS = {
    "l2_normalize": (normalize_triton, "FORWARD", "BACKWARD"),
    "lerp_retract": (normalize_triton, "LERP_FORWARD", "LERP_BACKWARD"),
    "scale_features": (scale_triton, "FORWARD", "BACKWARD"),
    "scale_tokens": (scale_triton, "TOKENS", "TOKENS"),
} | dict.fromkeys(ACTIVATIONS, (activation_triton, "FORWARD", "BACKWARD"))
TESTS = Path(__file__).parents[1] / "gpu" / "test_row_kernels.py"


@dataclass(frozen=True)
class Case:
    """One operation at a shape of one of the models.

    Attributes:
        shape: of the result.
        groups: of rows with a scale of their own; 0: one for all.
    """

    operation: str
    shape: tuple[int, ...]
    groups: int = 0

    @property
    def name(self) -> str:
        return f"{self.operation} {'x'.join(map(str, self.shape))}{f' in {self.groups} groups' if self.groups else ''}"

    def sizes(self) -> list[list[int]]:
        """Rows of each group: uneven, some empty; as the arguments behind the tensors, of which there are none without groups."""
        if not self.groups:
            return []
        weights = torch.rand(self.groups, generator=torch.Generator().manual_seed(1)) ** 2
        weights[:: self.groups // 4] = 0
        sizes = (weights / weights.sum() * self.shape[0]).int()
        sizes[-1] += self.shape[0] - sizes.sum()
        return [sizes.tolist()]

    def bytes_moved(self, backward: bool) -> int:
        """Of activations in bf16, and of the fp32 numbers that a row has."""
        elements = torch.Size(self.shape).numel()
        rows = elements // self.shape[-1]
        gated = self.operation in ACTIVATIONS and TABLE[ACTIVATIONS[self.operation]].gated
        tensors = ((3, 5) if gated or self.operation == "lerp_retract" else (2, 3))[backward]
        a_row = {"lerp_retract": 3, "l2_normalize": 1, "scale_tokens": 1 + backward}.get(self.operation, 0)
        a_row += self.operation.startswith("normalized")
        return 2 * tensors * elements + 4 * a_row * rows


CASES = (
    Case("l2_normalize", (8192, 6144)),
    Case("l2_normalize", (16384, 4096)),
    Case("l2_normalize", (16384, 2048)),
    Case("l2_normalize", (98304, 1856)),
    Case("lerp_retract", (8192, 2048)),
    Case("lerp_retract", (49152, 2048)),
    Case("lerp_retract", (16384, 1024)),
    Case("lerp_retract", (8192, 2688)),
    Case("scale_features", (8192, 6144)),
    Case("scale_features", (16384, 6176)),
    Case("scale_features", (8192, 131072)),
    Case("scale_tokens", (49152, 1024)),
    Case("scale_tokens", (98304, 2688)),
    Case("squared_relu", (16384, 6144)),
    Case("normalized squared_relu", (16384, 6144)),
    Case("normalized squared_relu", (16384, 3712)),
    Case("normalized squared_relu", (49152, 1856), 64),
    Case("normalized squared_relu", (98304, 1856), 128),
    Case("normalized squared_relu", (98304, 1024), 64),
    Case("swiglu", (16384, 4096)),
    Case("normalized swiglu", (16384, 4096)),
    Case("normalized swiglu", (49152, 1024), 64),
)


def make(case: Case, dtype: torch.dtype, seed: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    inputs = make_inputs(case.operation, case.shape, dtype, generator, case.groups)
    return inputs, torch.randn(case.shape, generator=generator, device=DEVICE, dtype=dtype)


def calls(case: Case, inputs: list[Tensor], grad: Tensor, eager: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward pass of a backend."""
    normalize, scale = (normalize_eager, scale_eager) if eager else (normalize_triton, scale_triton)
    if case.operation == "l2_normalize":
        inverse = normalize.l2_forward(*inputs, -1, None)[1]
        return lambda: normalize.l2_forward(*inputs, -1, None), lambda: normalize.l2_backward(grad, *inputs, inverse, -1, None)
    if case.operation == "lerp_retract":
        saved = normalize.lerp_forward(*inputs, FACTOR)[1]
        return lambda: normalize.lerp_forward(*inputs, FACTOR), lambda: normalize.lerp_backward(grad, *inputs, FACTOR, saved)
    if case.operation in ACTIVATIONS:
        return activation_calls(case, inputs, grad, eager)
    kind = case.operation.split("_")[1]
    forward, backward = getattr(scale, f"{kind}_forward"), getattr(scale, f"{kind}_backward")
    arguments = inputs if kind == "tokens" else (*inputs, FACTOR)
    return lambda: forward(*arguments), lambda: backward(grad, *arguments)


def activation_calls(case: Case, inputs: list[Tensor], grad: Tensor, eager: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    row = TABLE[ACTIVATIONS[case.operation]]
    form = Form(row.function, row.gated, case.operation.startswith("normalized"), None)
    sizes = case.sizes()[0] if case.groups else None
    if eager and case.groups:  # their rows' scales cannot be spread out in a CUDA graph
        return torch.cuda.current_stream, torch.cuda.current_stream
    if eager:
        module, forward, groups = activation_eager, activation_eager.forward, sizes
    else:
        module, forward = activation_triton, activation_triton.activate
        groups = activation_triton.make_groups(*inputs, grad.size(-1), sizes) if case.groups else None
    inverse = forward(*inputs, FACTOR, form, groups)[1]
    return lambda: forward(*inputs, FACTOR, form, groups), lambda: module.backward(grad, *inputs, FACTOR, form, inverse, groups)


def median_seconds(works: list[Callable[[], object]]) -> float:
    """Median time of a call, CALLS of them in turn."""
    return median_seconds_in_graph(lambda i: works[i % len(works)](), CALLS, REPLAYS, kept=len(works))


def measure(case: Case, copy: float) -> list[dict[str, object]]:
    """Forward and backward pass of the kernels and of the eager backend."""
    copies = max(1, min(4, 300_000_000 // case.bytes_moved(False)))
    sets = [make(case, torch.bfloat16, seed) for seed in range(copies)]
    pairs = {eager: [calls(case, *one, eager) for one in sets] for eager in (False, True)}
    rows = []
    for backward in (False, True):
        seconds, eager_seconds = (median_seconds([pair[backward] for pair in pairs[eager]]) for eager in (False, True))
        moved = case.bytes_moved(backward)
        rows.append(
            {
                "case": case.name,
                "pass": "backward" if backward else "forward",
                "bytes_moved": moved,
                "median_us": seconds * 1e6,
                "tb_per_s": moved / seconds / 1e12,
                "share_of_copy": moved / seconds / copy,
                "eager_us": eager_seconds * 1e6,
            }
        )
    return rows


def sweep(case: Case, copy: float) -> None:
    """Try tilings of both passes; print the present one and the five best."""
    copies = max(1, min(4, 300_000_000 // case.bytes_moved(False)))
    sets = [make(case, torch.bfloat16, seed) for seed in range(copies)]
    for backward in (False, True):
        module, name = TILINGS[case.operation][0], TILINGS[case.operation][1 + backward]
        present, results = getattr(module, name), []
        others = itertools.product((4, 8), (8, 16, 32), (8, 12, 16, 32, 64), (1, 2, 3))
        distinct = {(t.tile(case.shape[-1]), t.resident, t.stages): t for t in [*itertools.starmap(Tiling, others), present]}
        for tiling in [present, *(other for other in distinct.values() if other != present)]:
            setattr(module, name, tiling)
            try:
                seconds = median_seconds([calls(case, *one, False)[backward] for one in sets])
            except OutOfResources:
                continue
            results.append((case.bytes_moved(backward) / seconds / copy, tiling))
        setattr(module, name, present)
        print(f"{case.name} {name}: present {results[0][0]:.1%} {dataclasses.astuple(present)}")
        for share, tiling in sorted(results, key=lambda result: -result[0])[:5]:
            print(f"    {share:.1%} {tiling}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a JSON file there")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--sweep", action="store_true", help="try other tilings instead of measuring")
    options = parser.parse_args()
    cases = [case for case in CASES if options.cases in case.name]
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]).returncode:
        print("The kernels are wrong here: nothing is measured.", file=sys.stderr)
        return 1
    copy = copy_bandwidth() * 1e9
    print(f"copy {copy / 1e12:.3f} TB/s")
    if options.sweep:
        for case in cases:
            sweep(case, copy)
        return 0
    print(f"{'case':44s} {'pass':8s} {'us':>8s} {'TB/s':>6s} {'of copy':>8s} {'eager us':>9s} {'faster':>7s}")
    rows = []
    for case in cases:
        for row in measure(case, copy):
            rows.append(row)
            print(
                f"{row['case']:44s} {row['pass']:8s} {row['median_us']:8.1f} {row['tb_per_s']:6.2f} {row['share_of_copy']:8.1%} "
                f"{row['eager_us']:9.1f} {row['eager_us'] / row['median_us']:6.1f}x",
                flush=True,
            )
        torch.cuda.empty_cache()
    if options.out:
        write_results(options.out, "row_kernels", copy, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
