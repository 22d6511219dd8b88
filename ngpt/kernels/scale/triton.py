"""Launch the Triton kernels, on CUDA or in Triton's interpreter. Functions as in `eager`, for tensors with elements."""

from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from ngpt.kernels.rows import Tiling, as_rows
from ngpt.kernels.scale.kernels import backward_kernel, forward_kernel, sum_pieces_kernel, tokens_backward_kernel, tokens_forward_kernel

FORWARD = Tiling(warps=4, elements=32, resident=48)
BACKWARD = Tiling(warps=4, elements=32, resident=16)
GROUPS = Tiling(warps=4, elements=32, resident=48)
TOKENS = Tiling(warps=4, elements=16, resident=64)


@dataclass(frozen=True)
class Groups:
    """The pieces of all groups as `kernels` wants them.

    Attributes:
        table: int32, on the device.
        pieces: how many.
    """

    table: Tensor
    pieces: int

    @property
    def starts(self) -> Tensor:
        """int32 [G + 1]: each group's first piece, and the number of pieces."""
        return self.table[3 * self.pieces :]


def features_forward(x: Tensor, scale: Tensor) -> Tensor:
    height, pieces = _pieces(x, FORWARD)
    return _forward(x, scale, FORWARD, height, pieces)


def features_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    height, pieces = _pieces(x, BACKWARD)
    grad_x, partial = _backward(grad, x, scale, BACKWARD, height, pieces)
    return grad_x, partial.sum(0)


def groups_forward(x: Tensor, scale: Tensor, sizes: list[int]) -> tuple[Tensor, Groups]:
    groups = make_groups(x, scale, sizes)
    return groups_product(x, scale, groups), groups


def groups_product(x: Tensor, scale: Tensor, groups: Groups) -> Tensor:
    """The forward pass where the groups are on the device already."""
    return _forward(x, scale, GROUPS, 0, groups.pieces, groups.table)


def groups_backward(grad: Tensor, x: Tensor, scale: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    grad_x, partial = _backward(grad, x, scale, GROUPS, 0, groups.pieces, groups.table)
    grad_scale, columns = torch.empty(scale.shape, device=x.device), 128
    grid = (triton.cdiv(scale.size(1), columns), scale.size(0))
    with torch.cuda.device_of(x):
        sum_pieces_kernel[grid](partial, groups.starts, grad_scale, scale.size(1), R=16, C=columns)
    return grad_x, grad_scale


def tokens_forward(x: Tensor, scale: Tensor) -> Tensor:
    x_rows, y = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = x_rows.shape
    height, columns, warps = TOKENS.tile(width)
    grid = (min(triton.cdiv(rows, height), TOKENS.programs(warps, x.device)),)
    tile = {"WIDTH": width, "R": height, "C": columns, "STAGES": TOKENS.stages, "num_warps": warps}
    with torch.cuda.device_of(x):
        tokens_forward_kernel[grid](x_rows, scale.contiguous(), y, rows, x_rows.stride(0), **tile)
    return y


def tokens_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    grad_rows, x_rows, grad_x = as_rows(grad), as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_scale = torch.empty(scale.shape, device=x.device)
    rows, width = x_rows.shape
    height, columns, warps = TOKENS.tile(width)
    grid = (min(triton.cdiv(rows, height), TOKENS.programs(warps, x.device)),)
    tile = {"WIDTH": width, "R": height, "C": columns, "STAGES": TOKENS.stages, "num_warps": warps}
    strides = grad_rows.stride(0), x_rows.stride(0)
    with torch.cuda.device_of(x):
        tokens_backward_kernel[grid](grad_rows, x_rows, scale.contiguous(), grad_x, grad_scale, rows, *strides, **tile)
    return grad_x, grad_scale


def make_groups(x: Tensor, scale: Tensor, sizes: list[int]) -> Groups:
    """Cut every group into pieces of about equal work; one copy to the device, from pinned memory, which nothing waits for.

    Raises:
        ValueError: the sizes are not those of x's rows and of the scale's groups.
    """
    if len(sizes) != scale.size(0) or sum(sizes) != x.size(0):
        raise ValueError(
            f"sizes: {len(sizes)} groups of {sum(sizes)} rows in all, but scale has {scale.size(0)} groups and x {x.size(0)} rows. "
            "Pass the number of rows of each group, in their order."
        )
    height, _ = _pieces(x, GROUPS)
    rows_of = np.asarray(sizes, dtype=np.int32)
    pieces_of = -(-rows_of // height)
    starts, ends = np.append(0, pieces_of.cumsum()), rows_of.cumsum()
    group = np.repeat(np.arange(len(sizes)), pieces_of)
    first = (ends - rows_of)[group] + (np.arange(len(group)) - starts[group]) * height
    host = torch.empty(3 * len(group) + len(starts), dtype=torch.int32, pin_memory=x.is_cuda)
    np.concatenate((group, first, np.minimum(first + height, ends[group]), starts), out=host.numpy(), casting="same_kind")
    return Groups(host.to(x.device, non_blocking=True), len(group))


def _pieces(x: Tensor, tiling: Tiling) -> tuple[int, int]:
    """Rows of a piece, whole tiles, so that there are about as many programs as the tiling wants; and how many pieces."""
    width = x.size(-1)
    rows = x.numel() // width
    tile_rows, columns, warps = tiling.strip(width)
    wanted = max(1, tiling.programs(warps, x.device) // triton.cdiv(width, columns))
    height = triton.cdiv(triton.cdiv(rows, wanted), tile_rows) * tile_rows
    return height, triton.cdiv(rows, height)


def _forward(x: Tensor, scale: Tensor, tiling: Tiling, height: int, pieces: int, table: Tensor | None = None) -> Tensor:
    x_rows, y = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = x_rows.shape
    tile_rows, columns, warps = tiling.strip(width)
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(width, columns), pieces)](
            x_rows,
            scale.contiguous(),
            y,
            table,
            rows,
            height,
            width,
            x_rows.stride(0),
            R=tile_rows,
            C=columns,
            GROUPED=table is not None,
            STAGES=tiling.stages,
            num_warps=warps,
        )
    return y


def _backward(
    grad: Tensor, x: Tensor, scale: Tensor, tiling: Tiling, height: int, pieces: int, table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and each piece's part of the scale's [pieces, width]."""
    grad_rows, x_rows, grad_x = as_rows(grad), as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = x_rows.shape
    tile_rows, columns, warps = tiling.strip(width)
    partial = torch.empty(pieces, width, device=x.device)
    with torch.cuda.device_of(x):
        backward_kernel[(triton.cdiv(width, columns), pieces)](
            grad_rows,
            x_rows,
            scale.contiguous(),
            grad_x,
            partial,
            table,
            rows,
            height,
            width,
            grad_rows.stride(0),
            x_rows.stride(0),
            R=tile_rows,
            C=columns,
            GROUPED=table is not None,
            STAGES=tiling.stages,
            num_warps=warps,
        )
    return grad_x, partial
