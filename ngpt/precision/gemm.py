"""The reference GEMM of two NVFP4 operands."""

import functools
import math
import operator
from typing import Literal

import torch
from torch import Tensor

from ngpt.precision.formats import E2M1_MAX
from ngpt.precision.tensor import Operand, QuantizedTensor

FactorFormula = Literal["kernel", "division"]
REDUCTION_MULTIPLE = 32
OUTPUT_COLUMNS_MULTIPLE = 8


def qgemm(a: QuantizedTensor, b: QuantizedTensor, dtype: torch.dtype = torch.float32, factor: FactorFormula = "kernel") -> Tensor:
    """a b^T: D_MN = factor * sum_K of the operands' code * block scale, one final rounding to `dtype`.

    fprop: x rowwise, w rowwise. dgrad: grad_output rowwise, w columnwise. wgrad: grad_output columnwise, x columnwise. The sum is taken
    in fp64, where it is exact and so independent of order, then rounded to fp32: an ideal fp32 accumulator.

    Args:
        a: stored matrix [M, K].
        b: stored matrix [N, K].
        dtype: of the result.
        factor: "kernel": amax_a * amax_b * fl(1 / (36 * bound_a * bound_b)), as on Blackwell. "division": amax_a * amax_b divided by
            that constant, as in Transformer Engine's Python reference. They differ by at most one fp32 rounding.

    Raises:
        ValueError: K differs or is not a multiple of 32, N is not a multiple of 8, or one operand is in the rotated domain of
            another Hadamard transform than the other.

    Source: NVFP4 as Transformer Engine 2.20.2 computes it.
    """
    _check_operands(a, b)
    total = (a.decode().double() @ b.decode().double().t()).float()
    return (global_factor(a, b, factor) * total).to(dtype)


def global_factor(a: QuantizedTensor, b: QuantizedTensor, formula: FactorFormula = "kernel") -> Tensor:
    """fp32 factor between the sum of code * block scale products and the result: [1, 1], or [M, 1], [1, N] for row-scaled operands."""
    amax = a.global_amax.view(-1, 1) * b.global_amax.view(1, -1)
    constant = E2M1_MAX * E2M1_MAX * a.e4m3_bound * b.e4m3_bound
    if formula == "kernel":
        return amax * torch.full((), 1 / constant, dtype=torch.float32, device=amax.device)
    if formula == "division":
        return torch.div(amax, torch.full((), constant, dtype=torch.float32, device=amax.device))
    raise ValueError(f"factor: {formula!r} is not 'kernel' or 'division'. Choose one of them.")


def factor_of_operands(a: Operand, b: Operand) -> Tensor | None:
    """The kernel formula of `global_factor`, for operands whose values may hold the global scale already.

    Returns:
        fp32 [1] amax_a * amax_b * fl(1 / (36 * bound_a * bound_b)); of one operand alone amax * fl(1 / (6 * bound)); None of none.
    """
    scaled = [operand for operand in (a, b) if operand.global_amax is not None]
    if not scaled:
        return None
    constant = math.prod(E2M1_MAX * operand.e4m3_bound for operand in scaled)
    amax = functools.reduce(operator.mul, (operand.global_amax for operand in scaled))
    return amax * (1 / constant)  # torch rounds the number to fp32 first


def _check_operands(a: QuantizedTensor, b: QuantizedTensor) -> None:
    (_, k), (n, other_k) = a.stored_shape, b.stored_shape
    if k != other_k:
        raise ValueError(f"reduction over {k} and {other_k}: both stored matrices need the same second dimension. Check the directions.")
    if k % REDUCTION_MULTIPLE:
        way_out = f"Pad to {-(-k // REDUCTION_MULTIPLE) * REDUCTION_MULTIPLE} with zeros before quantising."
        raise ValueError(f"reduction over {k}: NVFP4 GEMMs need a multiple of {REDUCTION_MULTIPLE}. {way_out}")
    if n % OUTPUT_COLUMNS_MULTIPLE:
        way_out = f"Pad to {-(-n // OUTPUT_COLUMNS_MULTIPLE) * OUTPUT_COLUMNS_MULTIPLE} with zeros."
        raise ValueError(f"{n} rows of the second operand: NVFP4 GEMMs need a multiple of {OUTPUT_COLUMNS_MULTIPLE}. {way_out}")
    if a.rht != b.rht:
        raise ValueError(f"rht {a.rht!r} and {b.rht!r}: the transforms cancel only if both operands had the same one. Use one recipe.")
