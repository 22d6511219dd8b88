"""Check the NVFP4 quantiser kernels on a GPU: bit by bit against the reference, golden files, and the law of stochastic rounding.

python tests/bench/nvfp4_quantize_check.py [--elements N]        plain torch and triton; exit code 1 if anything differs
"""

import argparse
import itertools
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from ngpt.kernels.nvfp4_quantize import emulate, quantize_packed
from ngpt.kernels.nvfp4_quantize.device import reciprocal
from ngpt.precision import QuantizerSpec, quantize
from ngpt.precision.check_golden import check_file, kernel_quantizer
from ngpt.precision.formats import E2M1_VALUES
from ngpt.precision.rounding import stream_seed

GOLDEN = Path(__file__).parents[1] / "numerics" / "golden"
ELEMENTS = 100_000_000
SEED = stream_seed(1, 0, "layers.0.mlp.linear_fc1", 10, 0)
MODES = [
    QuantizerSpec(block_shape=block, global_amax=amax, rht=rht, rounding=rounding)
    for amax, block, rht, rounding in itertools.product(
        ("static", "dynamic", "dynamic_pow2"), ((1, 16), (16, 16)), ("off", "signed", "unsigned"), ("rtne", "sr")
    )
]


def adversarial(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Blocks of every size from flushed to saturated, ties of the E2M1 grid under every block scale, zeros, subnormals and extremes."""

    def choice(values: list[float], shape: tuple[int, ...]) -> Tensor:
        table = torch.tensor(values, device="cuda")
        return table[torch.randint(len(values), shape, generator=generator, device="cuda")]

    def sizes(shape: tuple[int, int]) -> Tensor:
        return torch.exp2(torch.randint(-26, 3, shape, generator=generator, device="cuda").float())

    x = torch.randn(rows, columns, generator=generator, device="cuda")
    x *= sizes((rows // 16, columns // 16)).repeat_interleave(16, 0).repeat_interleave(16, 1)
    ties = choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.5, 3.0, -0.25, -1.25, -2.5, -5.0], (rows // 4, columns))
    mantissa = choice([1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875], (rows // 4, columns // 16))
    x[: rows // 4] = ties * (mantissa * sizes((rows // 4, columns // 16)) / 64).repeat_interleave(16, 1)
    some = torch.rand(rows // 4, columns, generator=generator, device="cuda")
    x[-(rows // 4) :] *= (some > 0.1) * torch.where(some > 0.97, 2.0**-120, 1.0)
    x[16:32, :16], x[32:48, :16] = -0.0, choice([1e-45, -1e-40, 1e-38, 2.0**-126], (16, 16))
    return x.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, except that any NaN equals any other."""
    equal = (a == b) & (torch.signbit(a) == torch.signbit(b))
    return bool((equal | (a.isnan() & b.isnan())).all())


def check_mode(x: Tensor, spec: QuantizerSpec) -> list[str]:
    """What differs between kernels and reference, both directions, packed and dequantised."""
    problems = []
    seed = SEED if spec.rounding == "sr" else None
    counters = torch.zeros(2, 2, dtype=torch.int64, device=x.device)
    operands = emulate(x, spec, seed=seed, counters=counters)
    packed = quantize_packed(x, spec, seed=seed)
    for i, direction in enumerate(("rowwise", "columnwise")):
        truth = quantize(x, spec, direction, seed=seed)
        values = truth.decode()
        if operands[i].global_amax is None:
            values = values * torch.div(truth.global_amax, torch.full_like(truth.global_amax, 2688.0))
        values = (values.t() if i else values).to(x.dtype)
        agreement = {
            "codes or scales": packed[i].same_as(truth),
            "packed counters": packed[i].counters() == truth.counters(),
            "values": same(operands[i].values, values),
            "amax": operands[i].global_amax is None or same(operands[i].global_amax, truth.global_amax),
            "counters": counters[i].tolist() == [int(truth.saturated_elements), int(truth.flushed_blocks)],
        }
        problems += [f"{direction} {name} differ" for name, equal in agreement.items() if not equal]
    return problems


@triton.jit
def _reciprocal_kernel(x_ptr, ours_ptr, exact_ptr, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < n, other=1.0)
    tl.store(ours_ptr + place, reciprocal(x, tl.where(x < 2.0**-100, 2.0**32, 1.0)), mask=place < n)
    tl.store(exact_ptr + place, tl.minimum(tl.math.div_rn(1.0, x), 3.4028234663852886e38), mask=place < n)


def check_reciprocal() -> tuple[int, int]:
    """How many numbers have another reciprocal than IEEE division, of how many: all mantissas under 30 exponents below 126."""
    mantissa = torch.arange(1 << 23, dtype=torch.int32, device="cuda")
    exponents = sorted({*range(0, 253, 11), 0, 1, 2, 126, 127, 128, 251, 252})
    wrong = 0
    for exponent in exponents:
        x = ((exponent << 23) | mantissa).view(torch.float32)
        ours, exact = torch.empty_like(x), torch.empty_like(x)
        _reciprocal_kernel[(triton.cdiv(len(x), 1024),)](x, ours, exact, len(x), BLOCK=1024, enable_fp_fusion=False)
        wrong += int((ours != exact).sum())
    return wrong, len(exponents) << 23


def check_unbiased(elements: int) -> tuple[float, int]:
    """The largest |z| of the mean rounding error over the seven intervals of the E2M1 grid and all block scales, and how many z."""
    spec = QuantizerSpec(rounding="sr", global_amax="static")
    generator = torch.Generator("cuda").manual_seed(4)
    scale = torch.exp2(torch.randint(-6, 9, (elements // 2048, 128), generator=generator, device="cuda").float())
    scale *= 1 + torch.randint(0, 8, scale.shape, generator=generator, device="cuda") / 8
    scale.clamp_(max=448)
    v = 12 * torch.rand(*scale.shape, 16, generator=generator, device="cuda") - 6
    v[..., 0] = 6.0
    x = (v * scale[..., None] * 2.0**-11).view(elements // 2048, 2048)
    grid = torch.tensor(E2M1_VALUES, device="cuda")
    interval = torch.bucketize(v.abs(), grid[1:-1], right=True)
    low, high = grid[interval], grid[interval + 1]
    variance = ((high - v.abs()) * (v.abs() - low)).double()
    keys, group = torch.unique(scale, return_inverse=True)
    group = group[..., None] * 7 + interval
    drawn = emulate(x, spec, seed=SEED, columnwise=False)[0].values.view(v.shape) / (scale[..., None] * 2.0**-11)
    error = (drawn.double() - v.double()) * torch.sign(v).double()  # a bias towards zero must not cancel between signs
    count = len(keys) * 7
    sums = torch.zeros(count, dtype=torch.float64, device="cuda").index_add_(0, group.flatten(), error.flatten())
    variances = torch.zeros(count, dtype=torch.float64, device="cuda").index_add_(0, group.flatten(), variance.flatten())
    return (sums / variances.sqrt()).abs().max().item(), count


def check_independence(elements: int) -> float:
    """The largest |correlation| * sqrt(n) of round-up events between streams that differ in one thing, and within a stream by place."""
    spec = QuantizerSpec(rounding="sr", global_amax="static")
    x = torch.full((elements // 2048 // 16 * 16, 2048), 2.5 / 2048, device="cuda")
    x[::16], x[:, ::16] = 6 / 2048, 6 / 2048  # the largest value of every block makes its scale 1
    name = "layers.3.self_attention.linear_qkv"
    keys = [(1, 0, name, 5, 0), (2, 0, name, 5, 0), (1, 1, name, 5, 0), (1, 0, "layers.5.mlp.linear_fc1", 5, 0), (1, 0, name, 6, 0)]
    seeds = [stream_seed(*key) for key in (*keys, (1, 0, name, 5, 1))]
    ups = []
    for seed in seeds:
        row, column = emulate(x, spec, seed=seed)
        ups += [(value.values[1:, 1:].flatten() > 2.5 / 2048).float() for value in ((row, column) if seed == seeds[0] else (row,))]
    middle = (x[1:, 1:] == 2.5 / 2048).flatten()
    ups = [up[middle] - 0.5 for up in ups]
    pairs = list(itertools.combinations(ups, 2)) + [(ups[0][:-shift], ups[0][shift:]) for shift in (1, 2, 3, 4, 7, 8, 15, 16, 225)]
    return max(abs((a * b).mean().item() * 4) * len(a) ** 0.5 for a, b in pairs)


def check_golden_files() -> list[str]:
    problems = []
    for name in ("nvfp4_golden_shared.npz", "nvfp4_golden_sr.npz"):
        outcome, summary = check_file(GOLDEN / name, "cuda", kernel_quantizer)
        print(f"{name}: {summary}")
        problems += [f"{name}: {failure}" for failure in outcome.failures]
    return problems


def check_modes(elements: int, part: int, parts: int) -> list[str]:
    """Every mode of this part on a matrix that tiles do not fill, then on one that they do, with Inf and NaN."""
    failures = []
    generator = torch.Generator("cuda").manual_seed(1)
    columns = 8192 + 16 * 3
    cases = [(torch.bfloat16, spec) for spec in MODES] + [(torch.float32, spec) for spec in MODES[::5]]
    x = adversarial(elements // columns // 16 * 16, columns, torch.float32, generator)
    for dtype, spec in cases[part::parts]:
        began = time.perf_counter()
        problems = check_mode(x.to(dtype), spec)
        special = x[:2048, :8192].to(dtype)
        special[5, 7] = torch.inf
        problems += [f"with Inf: {problem}" for problem in check_mode(special, spec)]
        special[700, 100] = torch.nan
        problems += [f"with Inf and NaN: {problem}" for problem in check_mode(special, spec)]
        name = f"{spec.global_amax} {spec.block_shape[0]}x16 rht={spec.rht} {spec.rounding} {dtype}".replace("torch.", "")
        print(f"{name}: {x.numel():.2e} elements {problems or 'equal'} ({time.perf_counter() - began:.1f} s)", flush=True)
        failures += [f"{name}: {problem}" for problem in problems]
    return failures


def check_rest(elements: int) -> list[str]:
    """What concerns no single mode: golden files, the reciprocal, the law of stochastic rounding."""
    failures = check_golden_files()
    wrong, compared = check_reciprocal()
    print(f"reciprocal: {wrong} of {compared} differ from IEEE division")
    worst, count = check_unbiased(elements)
    print(f"stochastic rounding: largest |z| of {count} means {worst:.2f}")
    correlation = check_independence(elements // 4)
    print(f"independence: largest |correlation| * sqrt(n) {correlation:.2f}")
    claims = {"reciprocals differ": wrong > 0, "rounding is biased": worst >= 4, "streams correlate": correlation >= 4}
    return failures + [claim for claim, holds in claims.items() if holds]


def check_everything(elements: int, jobs: int) -> bool:
    """Whether everything agrees. As many processes share the modes, since compiling takes longer than checking."""
    command = [sys.executable, __file__, f"--elements={elements}"]
    running = [subprocess.Popen([*command, f"--part={part}/{jobs}"]) for part in range(jobs)]
    return all([process.wait() == 0 for process in running])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="of each mode's matrix")
    parser.add_argument("--jobs", type=int, default=4, help="processes")
    parser.add_argument("--part", metavar="I/N", help="only every Nth mode from the Ith on, in this process; part 0 checks the rest too")
    options = parser.parse_args()
    if not options.part:
        return 0 if check_everything(options.elements, options.jobs) else 1
    part, parts = map(int, options.part.split("/"))
    failures = check_modes(options.elements, part, parts) + (check_rest(options.elements) if part == 0 else [])
    print("\n".join(failures) or f"part {options.part}: everything agrees")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
