"""Launch the Triton kernels."""

import functools

import torch
from torch import Tensor

from ngpt.kernels.cross_entropy.kernels import backward_kernel, forward_kernel
from ngpt.kernels.launch import Launcher
from ngpt.kernels.rows import Tiling, as_rows

# Measured, see README.md. Forward: `warps` and `elements` of a tile of ROWS rows.
FORWARD = Tiling(warps=4, elements=64, resident=0, stages=3)
BACKWARD = Tiling(warps=4, elements=16, resident=64, stages=3)
ROWS, NEIGHBOURS = 4, 8  # rows that share a read of the scale; columns that a thread loads at once


def forward(x_TV: Tensor, scale: Tensor | None, factor: float, targets_T: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward` of the package: the three of `Statistics`."""
    x_TV = as_rows(x_TV)
    rows, width = x_TV.shape
    statistics = [torch.empty(rows, dtype=torch.float32, device=x_TV.device) for _ in range(3)]
    tensors = x_TV, None if scale is None else scale.contiguous(), targets_T.contiguous(), *statistics
    _forward(FORWARD, ROWS, scale is not None)((-(-rows // ROWS), 1, 1), tensors, (rows, columns, float(factor)), (width, x_TV.stride(0)))
    return tuple(statistics)


def backward_(
    grad_T: Tensor,
    x_TV: Tensor,
    scale: Tensor | None,
    factor: float,
    targets_T: Tensor,
    columns: int,
    largest_T: Tensor,
    total_T: Tensor,
    scale_of_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """As `backward_` of the package, which chooses between this and the other backend."""
    x_TV = as_rows(x_TV)
    rows, width = x_TV.shape
    tile_rows, tile_columns, warps = BACKWARD.strip(width)
    strips = -(-width // tile_columns)
    most = max(1, BACKWARD.programs(warps, x_TV.device) // strips)
    height = -(-rows // (most * tile_rows)) * tile_rows
    pieces = -(-rows // height)
    partial = None if scale is None else torch.empty(pieces, width, dtype=torch.float32, device=x_TV.device)
    vectors = [None if vector is None else vector.contiguous() for vector in (scale, scale_of_grad)]
    tensors = grad_T.float().contiguous(), x_TV, *vectors, targets_T.contiguous(), largest_T, total_T, partial
    launch = _backward(BACKWARD, width, scale is not None, scale_of_grad is not None)
    launch((strips, pieces, 1), tensors, (rows, columns, height, float(factor)), (width, x_TV.stride(0)))
    return x_TV, None if partial is None else partial.sum(0)


@functools.cache
def _forward(tiling: Tiling, rows: int, is_scaled: bool) -> Launcher:
    columns = tiling.warps * 32 * tiling.elements // rows
    shape = dict(R=rows, C=columns, E=min(NEIGHBOURS, columns), STAGES=tiling.stages)
    return Launcher(forward_kernel, SCALED=is_scaled, **shape, num_warps=tiling.warps, enable_fp_fusion=False)


@functools.cache
def _backward(tiling: Tiling, width: int, is_scaled: bool, takes_other: bool) -> Launcher:
    rows, columns, warps = tiling.strip(width)
    shape = dict(R=rows, C=columns, STAGES=tiling.stages)
    return Launcher(backward_kernel, SCALED=is_scaled, OTHER=takes_other, **shape, num_warps=warps, enable_fp_fusion=False)
