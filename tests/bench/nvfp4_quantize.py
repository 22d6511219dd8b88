"""Measure the NVFP4 quantiser kernels against the copy bandwidth of the same GPU in the same run.

    python tests/bench/nvfp4_quantize.py --out FOLDER [--check]            one GPU, plain torch and triton

Refuses to measure where kernels and reference disagree: on small matrices, with --check on 1e8 elements in every mode. Times are medians
over replays of a CUDA graph, so without launch overhead; the inputs rotate, so that none is found in L2. Bytes: every tensor once per
kernel that reads or writes it.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_tools import copy_bandwidth, median_seconds_in_graph, write_results
from nvfp4_quantize_check import ELEMENTS, SEED, adversarial, check_everything, check_mode

from ngpt.kernels.nvfp4_quantize import emulate, quantize_packed
from ngpt.precision import QuantizerSpec

SHAPES = ((24576, 2048), (24576, 6144))
ASSUMED_COPY_TBS = 2.9  # of an H100, for the prediction printed before measuring
CALLS, REPLAYS = 12, 15


@dataclass(frozen=True)
class Case:
    """What is timed, and the bytes it moves for each element of a bf16 input."""

    name: str
    spec: QuantizerSpec
    packed: bool
    amax_reads: int = 0
    directions: int = 2

    @property
    def bytes_per_element(self) -> float:
        written = 0.5 + 1 / 16 if self.packed else 2.0
        outputs = 1 if self.spec.same_both_ways and not self.packed else self.directions
        return 2.0 * (1 + self.amax_reads) + outputs * written

    def run(self, x: torch.Tensor, seed: int) -> object:
        return (quantize_packed if self.packed else emulate)(x, self.spec, columnwise=self.directions == 2, seed=seed)


STATIC = QuantizerSpec(global_amax="static")
GRAD_OUTPUT = QuantizerSpec(global_amax="dynamic_pow2", rounding="sr")
CASES = (
    Case("static, row + column, packed", STATIC, True),
    Case("static, row + column, bf16", STATIC, False),
    Case("static, row, bf16", STATIC, False, directions=1),
    Case("weight: static 16x16, bf16", QuantizerSpec(block_shape=(16, 16), global_amax="static"), False),
    Case("weight: dynamic 16x16, bf16", QuantizerSpec(block_shape=(16, 16)), False, amax_reads=1),
    Case("input: dynamic, row + column, bf16", QuantizerSpec(), False, amax_reads=1),
    Case("grad_output: dynamic_pow2 sr, row + column, bf16", GRAD_OUTPUT, False, amax_reads=1),
    Case("grad_output: dynamic_pow2 sr, row + column, packed", GRAD_OUTPUT, True, amax_reads=1),
    Case("rht: dynamic, row + rotated column, bf16", QuantizerSpec(rht="signed"), False, amax_reads=2),
    Case("rht: dynamic sr, row + rotated column, bf16", QuantizerSpec(rht="signed", rounding="sr"), False, amax_reads=2),
)


def measure(case: Case, inputs: list[torch.Tensor], copy: float) -> dict[str, object]:
    elements = inputs[0].numel()
    moved = case.bytes_per_element * elements
    seconds = median_seconds_in_graph(lambda i: case.run(inputs[i % len(inputs)], SEED + i), CALLS, REPLAYS)
    return {
        "case": case.name,
        "shape": list(inputs[0].shape),
        "bytes_moved": moved,
        "predicted_us": moved / ASSUMED_COPY_TBS / 1e6,
        "median_us": seconds * 1e6,
        "tb_per_s": moved / seconds / 1e12,
        "share_of_copy": moved / seconds / copy,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--check", action="store_true", help="check everything first")
    options = parser.parse_args()
    if options.check and not check_everything(ELEMENTS, jobs=4):
        return 1
    cases = [case for case in CASES if options.cases in case.name]
    generator = torch.Generator("cuda").manual_seed(2)
    small = adversarial(640, 2048 + 48, torch.bfloat16, generator)
    wrong = [f"{case.name}: {problem}" for case in cases for problem in check_mode(small, case.spec)]
    if wrong:
        print("\n".join(wrong), "nothing measured: kernels and reference disagree", sep="\n", file=sys.stderr)
        return 1
    for shape in SHAPES:
        for case in cases:
            megabytes = case.bytes_per_element * shape[0] * shape[1] / 1e6
            print(f"prediction {shape} {case.name}: {megabytes:.0f} MB, {megabytes / ASSUMED_COPY_TBS:.0f} us at {ASSUMED_COPY_TBS} TB/s")
    copy = copy_bandwidth() * 1e9
    print(f"copy {copy / 1e12:.3f} TB/s")
    rows = []
    for shape in SHAPES:
        inputs = [torch.nn.functional.normalize(torch.randn(shape, generator=generator, device="cuda"), dim=1).bfloat16() for _ in range(3)]
        for case in cases:
            rows.append(measure(case, inputs, copy))
            print(f"{shape} {case.name}: {rows[-1]['median_us']:.1f} us, {rows[-1]['share_of_copy']:.1%} of copy")
    write_results(options.out, "nvfp4_quantize", copy, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
