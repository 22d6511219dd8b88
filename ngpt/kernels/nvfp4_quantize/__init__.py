"""Quantise a matrix for both of its directions: the operands of NVFP4 GEMMs, emulated or packed.

CUDA tensors go through the Triton kernels, others through plain torch; both give the bits of `ngpt.precision.quantize`.

Shapes: x_MK tokens by features, or a weight's output by input features.
"""

import math

import torch
from torch import Tensor

from ngpt.kernels.nvfp4_quantize import eager
from ngpt.precision.quantize import as_matrix, check_stored, quantize
from ngpt.precision.tensor import Operand, QuantizedTensor
from ngpt.recipes import DIRECTIONS, STATIC_AMAX, OperandSpec, QuantizerSpec, SpecByDirection

_DTYPES = (torch.float32, torch.bfloat16)


def emulate(
    x_MK: Tensor,
    spec: OperandSpec,
    *,
    rowwise: bool = True,
    columnwise: bool = True,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    counters: Tensor | None = None,
) -> tuple[Operand | None, Operand | None]:
    """Quantise and dequantise: the values that NVFP4 GEMMs multiply.

    Args:
        x_MK: fp32, bf16 or fp16; leading dimensions are flattened to rows.
        spec: how to quantise. One that differs by direction reads x twice.
        rowwise: whether to make the operand with blocks along K.
        columnwise: whether to make the operand with blocks along M, rotated where the spec has an RHT. With unrotated square blocks it is
            the rowwise operand, the same object.
        seed: for stochastic rounding, see `ngpt.precision.rounding.stream_seed`.
        dtype: of the values, fp32 or bf16; by default x's.
        counters: int64 [2, 2]: saturated elements and flushed blocks are added to row 0 (rowwise) and 1 (columnwise). Never waits.

    Raises:
        ValueError: as `ngpt.precision.quantize`; an unsupported dtype.

    Source: NVFP4 as Transformer Engine 2.20.2 computes it; arXiv 2509.25149.
    """
    if isinstance(spec, SpecByDirection):
        options = {"seed": seed, "dtype": dtype, "counters": counters}
        row = emulate(x_MK, spec.rowwise, columnwise=False, **options)[0] if rowwise else None
        return row, emulate(x_MK, spec.columnwise, rowwise=False, **options)[1] if columnwise else None
    matrix, wanted = _checked(x_MK, spec, rowwise, columnwise, seed), (rowwise, columnwise)
    dtype = dtype or x_MK.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype}: code * block scale times a global scale is exact in fp32 and bf16. Pass one of them as dtype.")
    if spec.four_over_six or spec.row_scaled:
        return _emulate_slowly(matrix, spec, wanted, dtype, counters)
    fold = _folds_global_scale(spec)
    backend = _triton() if matrix.is_cuda else eager
    row, column = backend.quantize_dequantize(matrix, spec, wanted, dtype, fold, seed, counters)
    row_operand = row and Operand(row[0], None if fold else row[1], spec.e4m3_bound)
    if row and column and spec.same_both_ways:
        return row_operand, row_operand
    return row_operand, column and Operand(column[0], None if fold else column[1], spec.e4m3_bound)


def quantize_packed(
    x_MK: Tensor, spec: OperandSpec, *, rowwise: bool = True, columnwise: bool = True, seed: int | None = None
) -> tuple[QuantizedTensor | None, QuantizedTensor | None]:
    """Quantise to packed codes and block scales: `ngpt.precision.quantize` of both directions in one read.

    Args and Raises: as `emulate`.
    """
    if isinstance(spec, SpecByDirection):
        row = quantize_packed(x_MK, spec.rowwise, columnwise=False, seed=seed)[0] if rowwise else None
        return row, quantize_packed(x_MK, spec.columnwise, rowwise=False, seed=seed)[1] if columnwise else None
    matrix, wanted = _checked(x_MK, spec, rowwise, columnwise, seed), (rowwise, columnwise)
    if matrix.is_cuda and matrix.numel() and not (spec.four_over_six or spec.row_scaled):
        return _triton().quantize_packed(matrix, spec, wanted, tuple(x_MK.shape), seed)
    seed = seed if spec.rounding == "sr" else None
    row, column = (quantize(x_MK, spec, name, seed=seed) if want else None for name, want in zip(DIRECTIONS, wanted, strict=True))
    return row, column


def _triton():
    from ngpt.kernels.nvfp4_quantize import triton  # here, since triton may be missing where there is no CUDA

    return triton


def _folds_global_scale(spec: QuantizerSpec) -> bool:
    """Whether the global scale is a power of two, so that multiplying by it rounds nothing."""
    if spec.global_amax == "static":
        return math.frexp(spec.static_amax)[0] == math.frexp(STATIC_AMAX)[0]
    return spec.global_amax == "dynamic_pow2"


def _checked(x: Tensor, spec: QuantizerSpec, rowwise: bool, columnwise: bool, seed: int | None) -> Tensor:
    """x as a matrix that the blocks of both wanted directions tile."""
    matrix = as_matrix(x)
    rows, columns = matrix.shape
    if rowwise:
        check_stored(rows, columns, matrix.dtype, spec)
    if columnwise:
        check_stored(columns, rows, matrix.dtype, spec)
    if spec.rounding == "sr" and seed is None:
        raise ValueError("seed: None, but rounding 'sr' draws its random bits from it. Pass a number from stream_seed.")
    return matrix


def _emulate_slowly(
    matrix: Tensor, spec: QuantizerSpec, wanted: tuple[bool, bool], dtype: torch.dtype, counters: Tensor | None
) -> tuple[Operand | None, Operand | None]:
    """The options without kernels, through the reference."""
    operands: list[Operand | None] = [None, None]
    for i, name in enumerate(DIRECTIONS):
        if not wanted[i]:
            continue
        quantised = quantize(matrix, spec, name)
        if counters is not None:
            counters[i] += torch.stack((quantised.saturated_elements, quantised.flushed_blocks))
        values = quantised.decode() if name == "rowwise" else quantised.decode().t().contiguous()
        operands[i] = Operand(values.to(dtype), quantised.global_amax, quantised.e4m3_bound)
    if all(wanted) and spec.same_both_ways:
        operands[1] = operands[0]
    return operands[0], operands[1]
