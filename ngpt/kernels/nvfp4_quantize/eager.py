"""Quantise and dequantise in plain torch, cache-sized pieces at a time: the path of a CPU.

No codes are made: a value is scaled, rounded to the E2M1 grid and scaled back, in the reference's fp32 operations and so with its bits.

Shapes: x_MK the matrix, x_RK some of its rows (a multiple of 16), N blocks of a row or of 16 rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ngpt.precision.formats import E2M1_MAX, E4M3_MANTISSA_BITS, E4M3_MAX, E4M3_MIN_EXPONENT
from ngpt.precision.hadamard import HADAMARD_SIZE, SIGNS
from ngpt.precision.philox import random_bits, uniforms
from ngpt.precision.quantize import global_encode_scale, random_stream, rounded_amax
from ngpt.recipes import BLOCK, Direction, QuantizerSpec

CHUNK_ELEMENTS = 1 << 18
_EXPONENT_BITS = 0x7F800000
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class _Task:
    """One direction of a call: its matrix (rotated where the spec rotates), its scales, and where its values and counts go."""

    name: Direction
    spec: QuantizerSpec
    source_MK: Tensor
    amax: Tensor
    global_encode_scale: Tensor
    factor: Tensor
    values_MK: Tensor
    counters: list[Tensor]


def quantize_dequantize(
    x_MK: Tensor,
    spec: QuantizerSpec,
    wanted: tuple[bool, bool],
    dtype: torch.dtype,
    fold: bool,
    seed: int | None,
    counters: Tensor | None,
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """Values [M, K] and global amax fp32 [1] of the rowwise and of the columnwise direction, the same ones for unrotated square blocks.

    Args:
        x_MK: fp32, bf16 or fp16; dimensions checked by the caller.
        spec: without four_over_six and row_scaled.
        wanted: which directions.
        dtype: of the values.
        fold: whether values include the global decode scale.
        seed: for "sr".
        counters: int64 [2, 2]; saturated elements and flushed blocks are added to the row of each wanted direction.
    """
    rowwise, columnwise = wanted
    rows_to_count = [counters[i] for i in (0, 1) if counters is not None and wanted[i]]
    row = column = None
    if rowwise or spec.same_both_ways:
        amax = rounded_amax(_amax(x_MK, spec), spec)
        row = _task(x_MK, spec, "rowwise", amax, dtype, fold, rows_to_count if spec.same_both_ways else rows_to_count[:1])
    if columnwise and not spec.same_both_ways:
        source_MK = _rotate(x_MK, spec) if spec.rht != "off" else x_MK
        amax = row.amax if row and spec.rht == "off" else rounded_amax(_amax(source_MK, spec), spec)
        column = _task(source_MK, spec, "columnwise", amax, dtype, fold, rows_to_count[-1:])
    scratch = torch.empty(2, min(_chunk_rows(*x_MK.shape), len(x_MK)), x_MK.shape[1], device=x_MK.device)
    for rows in _chunks(*x_MK.shape):
        for task in filter(None, (row, column)):
            _quantize_rows(task, rows, scratch[:, : rows.stop - rows.start], seed)
    results = [task and (task.values_MK, task.amax) for task in (row, row if spec.same_both_ways else column)]
    return results[0] if rowwise else None, results[1] if columnwise else None


def _task(
    source_MK: Tensor, spec: QuantizerSpec, name: Direction, amax: Tensor, dtype: torch.dtype, fold: bool, counters: list[Tensor]
) -> _Task:
    factor = torch.div(amax, torch.full_like(amax, E2M1_MAX * E4M3_MAX)) if fold else torch.ones_like(amax)
    values_MK = torch.empty(source_MK.shape, dtype=dtype, device=source_MK.device)
    return _Task(name, spec, source_MK, amax, global_encode_scale(amax, spec), factor, values_MK, counters)


def _chunk_rows(rows: int, columns: int) -> int:
    return max(BLOCK, CHUNK_ELEMENTS // max(columns, 1) // BLOCK * BLOCK)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = _chunk_rows(rows, columns)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def _amax(x_MK: Tensor, spec: QuantizerSpec) -> Tensor:
    """fp32 [1] max |x|, which a static spec does not need; NaN propagates."""
    if spec.global_amax == "static" or not x_MK.numel():
        return torch.zeros(1, device=x_MK.device)
    lowest, highest = torch.aminmax(x_MK)
    return torch.maximum(-lowest, highest).float().view(1)


def _rotate(x_MK: Tensor, spec: QuantizerSpec) -> Tensor:
    """bf16 [M, K]: every group of 16 rows transformed, in the operations of `random_hadamard_transform` without its transposes."""
    rows, columns = x_MK.shape
    rotated_MK = torch.empty(x_MK.shape, dtype=torch.bfloat16, device=x_MK.device)
    scratch = torch.empty(2, min(_chunk_rows(rows, columns), rows), columns, dtype=torch.float64, device=x_MK.device)
    signs = torch.tensor(SIGNS, dtype=torch.float64, device=x_MK.device).view(1, HADAMARD_SIZE, 1)
    for part in _chunks(rows, columns):
        now, then = scratch[:, : part.stop - part.start].view(2, -1, HADAMARD_SIZE, columns)
        now.copy_(x_MK[part].view(now.shape))
        if spec.rht == "signed":
            now.mul_(signs)
        for half in (1, 2, 4, 8):
            first, second = now.view(-1, 2, half, columns).unbind(1)
            sums, differences = then.view(-1, 2, half, columns).unbind(1)
            torch.add(first, second, out=sums)
            torch.sub(first, second, out=differences)
            now, then = then, now
        rotated_MK[part] = now.div_(4).float().view(-1, columns)
    return rotated_MK


def _quantize_rows(task: _Task, rows: slice, scratch: Tensor, seed: int | None) -> None:
    """Some rows of one direction; scratch fp32 [2, R, K] saves allocations, which cost more than the arithmetic."""
    scaled_RK, other_RK = scratch
    x_RK = task.source_MK[rows] if task.source_MK.dtype == torch.float32 else scaled_RK.copy_(task.source_MK[rows])
    torch.abs(x_RK, out=other_RK)
    shape, block_dims = _block_view(x_RK.shape, task)
    # The bits of magnitudes order as the magnitudes do, with NaN on top, and torch reduces integers faster.
    block_amax = other_RK.view(torch.int32).view(shape).amax(block_dims, keepdim=True).view(torch.float32)
    mult = task.global_encode_scale * torch.full_like(task.amax, 1 / E2M1_MAX)
    decode = _round_to_e4m3(block_amax * mult)
    if task.counters:
        counts = torch.stack(((other_RK > task.amax).sum(), ((decode == 0) & (block_amax != 0)).sum()))
        for total in task.counters:
            total += counts
    one = torch.ones_like(task.amax)
    encode = torch.div(one, decode * torch.div(one, task.global_encode_scale)).clamp_(max=_FLOAT32_MAX)
    torch.mul(x_RK.reshape(shape), encode, out=scaled_RK.view(shape))
    scaled_RK.clamp_(-E2M1_MAX, E2M1_MAX)
    _round_to_e2m1_(scaled_RK, other_RK, _uniforms(task, rows, seed))
    torch.mul(scaled_RK.view(shape), decode * task.factor, out=task.values_MK[rows].view(shape))


def _uniforms(task: _Task, rows: slice, seed: int | None) -> Tensor | None:
    if task.spec.rounding != "sr":
        return None
    stream = random_stream(task.spec, task.name)
    return uniforms(random_bits(seed, stream, range(rows.start, rows.stop), task.source_MK.shape[1], task.source_MK.device))


def _block_view(shape: torch.Size, task: _Task) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape that shows blocks of [R, K], and the dimensions that lie within a block."""
    rows, columns = shape
    if task.spec.block_shape == (BLOCK, BLOCK):
        return (rows // BLOCK, BLOCK, columns // BLOCK, BLOCK), (1, 3)
    if task.name == "rowwise":
        return (rows, columns // BLOCK, BLOCK), (2,)
    return (rows // BLOCK, BLOCK, columns), (1,)


def _round_to_e4m3(values: Tensor) -> Tensor:
    """Nonnegative fp32 to the nearest E4M3 value, as fp32; NaN stays."""
    values = values.clamp(max=E4M3_MAX)
    # Adding 1.5 * 2^23 steps and taking them away rounds to the step: fp32 then has no finer bits, and ties go to even.
    power = torch.empty_like(values)
    _exponent_power(values.clamp(min=2.0**E4M3_MIN_EXPONENT), out=power)
    magic = power.mul_(1.5 * 2.0 ** (23 - E4M3_MANTISSA_BITS))
    return (values + magic).sub_(magic)


def _round_to_e2m1_(scaled: Tensor, step: Tensor, draws: Tensor | None) -> None:
    """In place: |v| <= 6 to the E2M1 grid of step .5 below 2, 1 below 4, else 2.

    Args:
        scaled: fp32, overwritten.
        step: fp32 of the same shape, overwritten.
        draws: for stochastic rounding uniforms of the same shape, overwritten; else ties go to even.
    """
    _exponent_power(scaled, out=step)
    step.clamp_(min=1.0).mul_(0.5)
    if draws is None:
        scaled.div_(step).round_().mul_(step)
        return
    moved = draws.mul_(step).add_(scaled.abs()).div_(step).floor_().mul_(step)
    torch.copysign(moved, scaled, out=scaled)


def _exponent_power(values: Tensor, out: Tensor) -> None:
    """2^floor(log2 |v|) of normal fp32 numbers, 0 of subnormal ones, Inf of Inf and NaN."""
    torch.bitwise_and(values.view(torch.int32), _EXPONENT_BITS, out=out.view(torch.int32))
