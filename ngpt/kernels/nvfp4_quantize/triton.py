"""Launch the Triton kernels: sm_90 and newer, or Triton's interpreter."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from ngpt.kernels.launch import Launcher
from ngpt.kernels.nvfp4_quantize.kernels import amax_kernel, dequantized_kernel, packed_kernel
from ngpt.precision.tensor import QuantizedTensor
from ngpt.recipes import BLOCK, Direction, QuantizerSpec


@dataclass(frozen=True)
class Tiling:
    """A program's tile, in strips of 16 rows and in columns, and how many of the columns, warps and registers it takes per thread."""

    strips: int
    columns: int
    warps: int
    vector: int
    registers: int | None = None

    def grid(self, x_MK: Tensor) -> tuple[int, int, int]:
        rows, columns = x_MK.shape
        return triton.cdiv(rows, self.strips * BLOCK) * triton.cdiv(columns, self.columns), 1, 1

    def is_even(self, x_MK: Tensor) -> bool:
        """Whether the tiles cover nothing but the matrix."""
        rows, columns = x_MK.shape
        return rows % (self.strips * BLOCK) == 0 and columns % self.columns == 0

    def constants(self, is_even: bool) -> dict[str, int | bool]:
        options = {"S": self.strips, "C": self.columns, "VEC": self.vector, "EVEN": is_even, "num_warps": self.warps}
        return options | ({"maxnreg": self.registers} if self.registers else {})


# Measured, see README.md.
DEQUANTIZED = Tiling(strips=4, columns=128, warps=4, vector=4, registers=128)
STOCHASTIC = Tiling(strips=4, columns=128, warps=4, vector=4)
ROTATED = Tiling(strips=8, columns=128, warps=4, vector=8)
PACKED = Tiling(strips=4, columns=128, warps=4, vector=4, registers=128)
AMAX = Tiling(strips=4, columns=128, warps=4, vector=4)
_AMAX = {"static": 0, "dynamic": 1, "dynamic_pow2": 2}
_RHT = {"off": 0, "signed": 1, "unsigned": 2}


def quantize_dequantize(
    x_MK: Tensor,
    spec: QuantizerSpec,
    wanted: tuple[bool, bool],
    dtype: torch.dtype,
    fold: bool,
    seed: int | None,
    counters: Tensor | None,
) -> tuple[tuple[Tensor, Tensor | None] | None, tuple[Tensor, Tensor | None] | None]:
    """As `eager.quantize_dequantize`, except that an amax folded into the values is None."""
    x_MK = x_MK.contiguous()
    rowwise, columnwise = wanted
    shared = spec.same_both_ways
    row_MK = torch.empty(x_MK.shape, dtype=dtype, device=x_MK.device) if rowwise or shared else None
    column_MK = torch.empty(x_MK.shape, dtype=dtype, device=x_MK.device) if columnwise and not shared else None
    amax = _raw_amax(x_MK, spec, row_MK is not None, column_MK is not None)
    rotates = spec.rht != "off" and column_MK is not None
    _launch(
        dequantized_kernel,
        ROTATED if rotates else STOCHASTIC if spec.rounding == "sr" else DEQUANTIZED,
        x_MK,
        (row_MK, column_MK, amax[0], amax[1], counters),
        spec,
        seed,
        ROWWISE=row_MK is not None,
        COLUMNWISE=column_MK is not None,
        FOLD=fold,
        COUNT_ROW=counters is not None and rowwise,
        COUNT_COLUMN=counters is not None and columnwise,
    )
    row, column = ((values, None if fold else raw.view(torch.float32)) for values, raw in zip((row_MK, column_MK), amax, strict=True))
    return row if rowwise else None, (row if shared else column) if columnwise else None


def quantize_packed(
    x_MK: Tensor, spec: QuantizerSpec, wanted: tuple[bool, bool], shape: tuple[int, ...], seed: int | None
) -> tuple[QuantizedTensor | None, QuantizedTensor | None]:
    """Codes and scales of the wanted directions of a matrix with elements; `shape` is the original tensor's."""
    x_MK = x_MK.contiguous()
    amax = _raw_amax(x_MK, spec, *wanted)
    row = _stored(x_MK, *x_MK.shape, torch.int16) if wanted[0] else (None, None)
    column = _stored(x_MK, *x_MK.shape[::-1], torch.int32) if wanted[1] else (None, None)
    counts, amax_out = x_MK.new_zeros((2, 2), dtype=torch.int64), x_MK.new_empty(2, dtype=torch.float32)
    _launch(packed_kernel, PACKED, x_MK, (*row, *column, *amax, counts, amax_out), spec, seed, ROWWISE=wanted[0], COLUMNWISE=wanted[1])

    def result(i: int, direction: Direction, codes: Tensor, scales: Tensor) -> QuantizedTensor:
        return QuantizedTensor(
            codes=codes.view(torch.uint8),
            block_decode_scale=scales,
            global_amax=amax_out[i : i + 1],
            block_shape=spec.block_shape,
            shape=shape,
            direction=direction,
            rht=spec.rht if direction == "columnwise" else "off",
            e4m3_bound=spec.e4m3_bound,
            saturated_elements=counts[i, 0],
            flushed_blocks=counts[i, 1],
        )

    return result(0, "rowwise", *row) if wanted[0] else None, result(1, "columnwise", *column) if wanted[1] else None


def _stored(x_MK: Tensor, lines: int, length: int, word: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes, as words, and scale bytes of a stored matrix [lines, length], uninitialised."""
    codes = x_MK.new_empty((lines, length // (2 * word.itemsize)), dtype=word)
    return codes, x_MK.new_empty((lines, length // BLOCK), dtype=torch.uint8)


def _raw_amax(x_MK: Tensor, spec: QuantizerSpec, rowwise: bool, columnwise: bool) -> tuple[Tensor, Tensor]:
    """int32 [1] bit patterns of max |x| for the rowwise and, of the transformed x, the columnwise direction."""
    if spec.global_amax == "static":
        static = torch.full((1,), spec.static_amax, device=x_MK.device).view(torch.int32)
        return static, static
    amax = torch.zeros(8, dtype=torch.int32, device=x_MK.device)
    plain, rotated = amax[:1], amax[4:5]  # 16 bytes apart, see `Launcher`
    wanted = [(plain, "off")] * (rowwise or spec.rht == "off") + [(rotated, spec.rht)] * (columnwise and spec.rht != "off")
    for out, rht in wanted if x_MK.numel() else ():
        _launcher(amax_kernel, AMAX, AMAX.is_even(x_MK), RHT=_RHT[rht])(AMAX.grid(x_MK), (x_MK, out), (), tuple(x_MK.shape))
    return plain, rotated if spec.rht != "off" else plain


@functools.cache
def _static_scales(amax: float) -> tuple[float, float, float]:
    """amax and the global encode and decode scales that `global_encode_scale` makes of it."""
    encode = min(np.float32(2688) / np.float32(amax), np.finfo(np.float32).max)
    return float(amax), float(encode), float(np.float32(1) / encode)


def _launch(
    kernel: triton.JITFunction,
    tiling: Tiling,
    x_MK: Tensor,
    tensors: tuple[Tensor | None, ...],
    spec: QuantizerSpec,
    seed: int | None,
    **switches: bool,
) -> None:
    if not x_MK.numel():
        return
    launch = _launcher(
        kernel,
        tiling,
        tiling.is_even(x_MK),
        SQUARE=spec.block_shape == (BLOCK, BLOCK),
        AMAX=_AMAX[spec.global_amax],
        RHT=_RHT[spec.rht],
        STOCHASTIC=spec.rounding == "sr",
        **switches,
    )
    launch(tiling.grid(x_MK), (x_MK, *tensors), (*_static_scales(spec.static_amax), seed or 0), tuple(x_MK.shape))


@functools.cache
def _launcher(kernel: triton.JITFunction, tiling: Tiling, is_even: bool, **constants: int | bool) -> Launcher:
    return Launcher(kernel, **constants, **tiling.constants(is_even), enable_fp_fusion=False)  # see `device`
