"""Launch the Triton kernels: sm_90 and newer, or Triton's interpreter."""

import functools

import numpy as np
import torch
import triton
from torch import Tensor

from ngpt.kernels.nvfp4_quantize.kernels import amax_kernel, dequantized_kernel, packed_kernel
from ngpt.precision.quantize import QuantizerSpec
from ngpt.precision.tensor import BLOCK, QuantizedTensor

# A program's tile in strips of 16 rows and in columns, and its warps: measured, see README.md.
STRIPS, COLUMNS, WARPS = 8, 128, 4
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
    _launch(
        dequantized_kernel,
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
    """Codes and scales of the wanted directions; `shape` is the original tensor's."""
    x_MK = x_MK.contiguous()
    rows, columns = x_MK.shape
    new = torch.empty if x_MK.numel() else torch.zeros  # no program writes the amax of an empty matrix
    stored = ((rows, columns), (columns, rows))
    codes = [x_MK.new_empty((lines, length // 2), dtype=torch.uint8) if want else None for (lines, length), want in zip(stored, wanted)]
    scales = [x_MK.new_empty((lines, length // BLOCK), dtype=torch.uint8) if want else None for (lines, length), want in zip(stored, wanted)]
    counts, amax_out = x_MK.new_zeros((2, 2), dtype=torch.int64), new(2, device=x_MK.device)
    amax = _raw_amax(x_MK, spec, *wanted)
    words = [None if code is None else code.view(torch.int32) for code in codes]
    outputs = (words[0], scales[0], words[1], scales[1], amax[0], amax[1], counts, amax_out)
    _launch(packed_kernel, x_MK, outputs, spec, seed, ROWWISE=wanted[0], COLUMNWISE=wanted[1])
    directions = [
        QuantizedTensor(
            codes=codes[i],
            block_decode_scale=scales[i],
            global_amax=amax_out[i : i + 1],
            block_shape=spec.block_shape,
            shape=shape,
            direction=name,
            rht=spec.rht if name == "columnwise" else "off",
            e4m3_bound=spec.e4m3_bound,
            saturated_elements=counts[i, 0],
            flushed_blocks=counts[i, 1],
        )
        if wanted[i]
        else None
        for i, name in enumerate(("rowwise", "columnwise"))
    ]
    return directions[0], directions[1]


def _tiling(x_MK: Tensor) -> tuple[tuple[int], dict[str, int | bool]]:
    rows, columns = x_MK.shape
    tall = STRIPS * BLOCK
    grid = (triton.cdiv(rows, tall) * triton.cdiv(columns, COLUMNS),)
    return grid, {"S": STRIPS, "C": COLUMNS, "EVEN": rows % tall == 0 and columns % COLUMNS == 0}


def _raw_amax(x_MK: Tensor, spec: QuantizerSpec, rowwise: bool, columnwise: bool) -> tuple[Tensor, Tensor]:
    """int32 [1] bit patterns of max |x| for the rowwise and, of the transformed x, the columnwise direction."""
    if spec.global_amax == "static":
        static = torch.full((1,), spec.static_amax, device=x_MK.device).view(torch.int32)
        return static, static
    amax = torch.zeros(2, dtype=torch.int32, device=x_MK.device)
    plain, rotated = amax[:1], amax[1:]
    grid, tiling = _tiling(x_MK)
    with torch.cuda.device_of(x_MK):
        if rowwise or spec.rht == "off":
            amax_kernel[grid](x_MK, plain, *x_MK.shape, RHT=0, num_warps=WARPS, **tiling)
        if columnwise and spec.rht != "off":
            amax_kernel[grid](x_MK, rotated, *x_MK.shape, RHT=_RHT[spec.rht], num_warps=WARPS, enable_fp_fusion=False, **tiling)
    return plain, rotated if spec.rht != "off" else plain


@functools.cache
def _static_scales(amax: float) -> tuple[float, float, float]:
    """amax and the global encode and decode scales that `global_encode_scale` makes of it."""
    encode = min(np.float32(2688) / np.float32(amax), np.finfo(np.float32).max)
    return amax, float(encode), float(np.float32(1) / encode)


def _launch(kernel, x_MK: Tensor, tensors: tuple[Tensor | None, ...], spec: QuantizerSpec, seed: int | None, **switches: bool) -> None:
    grid, tiling = _tiling(x_MK)
    if not grid[0]:
        return
    with torch.cuda.device_of(x_MK):
        kernel[grid](
            x_MK,
            *tensors,
            *_static_scales(spec.static_amax),
            seed or 0,
            *x_MK.shape,
            SQUARE=spec.block_shape == (BLOCK, BLOCK),
            AMAX=_AMAX[spec.global_amax],
            RHT=_RHT[spec.rht],
            STOCHASTIC=spec.rounding == "sr",
            **switches,
            **tiling,
            num_warps=WARPS,
            enable_fp_fusion=False,  # see `device`
        )
