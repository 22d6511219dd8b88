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
from ngpt.recipes import BLOCK, Direction, QuantizerSpec, Rht


@dataclass(frozen=True)
class Tiling:
    """A program's tile, in strips of 16 rows and in columns; columns and registers per thread; and warps."""

    strips: int
    columns: int
    warps: int
    vector: int
    registers: int | None = None

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


class _TiledKernel:
    """A kernel whose programs take a tile of x each, ready to launch on matrices that tiles cover exactly and on others.

    Args:
        constants: of the kernel, without those of the tiling.
    """

    def __init__(self, kernel: triton.JITFunction, tiling: Tiling, **constants: int | bool):
        self._tile = tiling.strips * BLOCK, tiling.columns
        self._launchers = [  # enable_fp_fusion: see `device`
            Launcher(kernel, **constants, **tiling.constants(is_even), enable_fp_fusion=False) for is_even in (False, True)
        ]

    def __call__(self, x_MK: Tensor, tensors: tuple[Tensor | None, ...], unspecialized: tuple[float, ...] = ()) -> None:
        rows, columns = x_MK.shape
        if not rows or not columns:
            return
        height, width = self._tile
        is_even = rows % height == 0 and columns % width == 0
        programs = -(-rows // height) * -(-columns // width)
        self._launchers[is_even]((programs, 1, 1), (x_MK, *tensors), unspecialized, (rows, columns))


@functools.cache
def _dequantizer(spec: QuantizerSpec, rowwise: bool, columnwise: bool, fold: bool, count_row: bool, count_column: bool) -> _TiledKernel:
    rotates = spec.rht != "off" and columnwise
    tiling = ROTATED if rotates else STOCHASTIC if spec.rounding == "sr" else DEQUANTIZED
    constants = _constants(spec, rowwise, columnwise)
    return _TiledKernel(dequantized_kernel, tiling, **constants, FOLD=fold, COUNT_ROW=count_row, COUNT_COLUMN=count_column)


@functools.cache
def _packer(spec: QuantizerSpec, rowwise: bool, columnwise: bool) -> _TiledKernel:
    return _TiledKernel(packed_kernel, PACKED, **_constants(spec, rowwise, columnwise))


@functools.cache
def _amax_taker(rht: Rht) -> _TiledKernel:
    return _TiledKernel(amax_kernel, AMAX, RHT=_RHT[rht])


def _constants(spec: QuantizerSpec, rowwise: bool, columnwise: bool) -> dict[str, int | bool]:
    return {
        "ROWWISE": rowwise,
        "COLUMNWISE": columnwise,
        "SQUARE": spec.block_shape == (BLOCK, BLOCK),
        "AMAX": _AMAX[spec.global_amax],
        "RHT": _RHT[spec.rht],
        "STOCHASTIC": spec.rounding == "sr",
    }


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
    (rowwise, columnwise), shared, counted = wanted, spec.same_both_ways, counters is not None
    row_MK = torch.empty_like(x_MK, dtype=dtype) if rowwise or shared else None
    column_MK = torch.empty_like(x_MK, dtype=dtype) if columnwise and not shared else None
    makes = row_MK is not None, column_MK is not None
    amax = _raw_amax(x_MK, spec, *makes)
    quantizer = _dequantizer(spec, *makes, fold, counted and rowwise, counted and columnwise)
    quantizer(x_MK, (row_MK, column_MK, *amax, counters), _numbers(spec, seed))
    row_amax, column_amax = (None, None) if fold else (_as_float(raw, spec, x_MK) for raw in amax)
    row, column = (row_MK, row_amax), (column_MK, column_amax)
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
    _packer(spec, *wanted)(x_MK, (*row, *column, *amax, counts, amax_out), _numbers(spec, seed))

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


def _raw_amax(x_MK: Tensor, spec: QuantizerSpec, rowwise: bool, columnwise: bool) -> tuple[Tensor | None, Tensor | None]:
    """int32 [1] bit patterns of max |x| for the rowwise and, of the transformed x, the columnwise direction; None under a static scale."""
    if spec.global_amax == "static":
        return None, None
    if spec.rht == "off":
        amax = torch.zeros(1, dtype=torch.int32, device=x_MK.device)
        _amax_taker("off")(x_MK, (amax,))
        return amax, amax
    both = torch.zeros(8, dtype=torch.int32, device=x_MK.device)
    plain, rotated = both[:1], both[4:5]  # 16 bytes apart, see `Launcher`
    if rowwise:
        _amax_taker("off")(x_MK, (plain,))
    if columnwise:
        _amax_taker(spec.rht)(x_MK, (rotated,))
    return plain, rotated


def _as_float(raw: Tensor | None, spec: QuantizerSpec, x_MK: Tensor) -> Tensor:
    """fp32 [1] from what `_raw_amax` gave."""
    return x_MK.new_full((1,), spec.static_amax, dtype=torch.float32) if raw is None else raw.view(torch.float32)


def _numbers(spec: QuantizerSpec, seed: int | None) -> tuple[float, ...]:
    """The arguments that the kernels do not specialise on."""
    return *_static_scales(spec.static_amax), seed or 0


@functools.cache
def _static_scales(amax: float) -> tuple[float, float, float]:
    """amax and the global encode and decode scales that `global_encode_scale` makes of it."""
    encode = min(np.float32(2688) / np.float32(amax), np.finfo(np.float32).max)
    return float(amax), float(encode), float(np.float32(1) / encode)
