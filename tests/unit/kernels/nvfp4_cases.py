"""What the quantiser's backends are tested with: specs, difficult inputs, and the reference's answer."""

import itertools

import torch
from torch import Tensor

from ngpt.precision import QuantizerSpec, quantize

SEED = 0x1234_5678_9ABC_DEF
DIRECTIONS = ("rowwise", "columnwise")
SPECS = [
    QuantizerSpec(block_shape=block, global_amax=amax, static_amax=static, rht=rht, rounding=rounding)
    for (amax, static), block, rht, rounding in itertools.product(
        (("dynamic", 1.3125), ("dynamic_pow2", 1.3125), ("static", 1.3125), ("static", 1.0)),
        ((1, 16), (16, 16)),
        ("off", "signed", "unsigned"),
        ("rtne", "sr"),
    )
]
KINDS = ("ordinary", "nan", "inf", "tiny")


def spec_name(spec: QuantizerSpec) -> str:
    return f"{spec.global_amax}{spec.static_amax}-{spec.block_shape[0]}x16-{spec.rht}-{spec.rounding}"


def folds(spec: QuantizerSpec) -> bool:
    """Whether operands hold the global scale: always a power of two, amax 1.3125 * 2^j over 2688 = 1.3125 * 2^11."""
    return {"dynamic": False, "dynamic_pow2": True, "static": spec.static_amax == 1.3125}[spec.global_amax]


def matrix(kind: str, rows: int = 48, columns: int = 96, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks of sizes from flushed to saturated, every tie of the grid, both zeros, subnormal numbers; with NaN, with Inf, or all tiny."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    size = torch.exp2(torch.randint(-26, 2, (rows // 16, columns // 16), generator=generator).float())
    x = torch.randn(rows, columns, generator=generator) * size.repeat_interleave(16, 0).repeat_interleave(16, 1)
    ties = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x[:8, :16] = torch.cat((ties, -ties)) * torch.exp2(torch.arange(8.0)).view(8, 1) / 2048
    x[:16, 32] = torch.cat((ties, -ties)) * 1.375 / 2048
    x[8:12, :16], x[3, 3] = 0.0, -0.0
    x[12], x[13] = 1e-40, -1e-45
    if kind == "nan":
        x[5, 40] = torch.nan
    if kind == "inf":
        x[7, 7], x[-1, -1] = torch.inf, -torch.inf
    return (x * 2.0**-120 if kind == "tiny" else x).to(dtype)


def expected_values(x: Tensor, spec: QuantizerSpec, direction: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, list[int]]:
    """The reference's code * block scale in x's orientation, with the global scale if it is a power of two, else beside it; the counts."""
    quantised = quantize(x, spec, direction, seed=SEED if spec.rounding == "sr" else None)
    values, amax = quantised.decode(), quantised.global_amax
    if folds(spec):
        values, amax = values * torch.div(amax, torch.tensor(2688.0)), None
    values = values.t() if direction == "columnwise" else values
    return values.to(dtype), amax, [int(quantised.saturated_elements), int(quantised.flushed_blocks)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, signs of zeros included, except that any NaN is as good as another."""
    equal = (a == b) & (torch.signbit(a) == torch.signbit(b)) | (a.isnan() & b.isnan())
    return a.shape == b.shape and a.dtype == b.dtype and bool(equal.all())
