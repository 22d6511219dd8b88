"""Launch the Triton kernels, on CUDA or in Triton's interpreter. Functions as in `eager`, for tensors with elements."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ngpt.kernels.launch import Launcher
from ngpt.kernels.rows import Tiling, as_rows, dense_like
from ngpt.kernels.scale.kernels import backward_kernel, forward_kernel, sum_pieces_kernel, tokens_backward_kernel, tokens_forward_kernel

FORWARD = Tiling(warps=4, elements=32, resident=48)
BACKWARD = Tiling(warps=4, elements=32, resident=16)
GROUPS = Tiling(warps=4, elements=32, resident=48)
TOKENS = Tiling(warps=4, elements=16, resident=64)


_SUM_COLUMNS = 128
_sum_pieces = Launcher(sum_pieces_kernel, R=16, C=_SUM_COLUMNS)


@dataclass(frozen=True)
class Groups:
    """The pieces of all groups as `kernels` wants them.

    Attributes:
        table: int32, on the device.
        pieces: how many.
    """

    table: Tensor
    pieces: int


def features_forward(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    plan = _plan(FORWARD, x.size(-1), False, x.device)
    return _forward(x, scale, factor, plan, *_pieces(x, plan))


def features_backward(grad: Tensor, x: Tensor, scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    plan = _plan(BACKWARD, x.size(-1), False, x.device, backward=True)
    grad_x, partial = _backward(grad, x, scale, factor, plan, *_pieces(x, plan))
    return grad_x, partial.sum(0)


def groups_forward(x: Tensor, scale: Tensor, factor: float, sizes: list[int]) -> tuple[Tensor, Groups]:
    groups = make_groups(x, scale, sizes)
    return groups_product(x, scale, factor, groups), groups


def groups_product(x: Tensor, scale: Tensor, factor: float, groups: Groups) -> Tensor:
    """The forward pass where the groups are on the device already."""
    return _forward(x, scale, factor, _plan(GROUPS, x.size(-1), True, x.device), 0, groups.pieces, groups.table)


def groups_backward(grad: Tensor, x: Tensor, scale: Tensor, factor: float, groups: Groups) -> tuple[Tensor, Tensor]:
    number, width = scale.shape
    plan = _plan(GROUPS, width, True, x.device, backward=True)
    grad_x, partial = _backward(grad, x, scale, factor, plan, 0, groups.pieces, groups.table)
    grad_scale = torch.empty(number, width, dtype=torch.float32, device=x.device)
    _sum_pieces((-(-width // _SUM_COLUMNS), number, 1), (partial, groups.table, grad_scale), (groups.pieces,), (width,))
    return grad_x, grad_scale


def tokens_forward(x: Tensor, scale: Tensor) -> Tensor:
    x_rows, y = as_rows(x), dense_like(x)
    rows, width = x_rows.shape
    plan = _tokens_plan(TOKENS, width, x.device)
    plan.launch((min(-(-rows // plan.rows), plan.most), 1, 1), (x_rows, scale.contiguous(), y), (rows,), (x_rows.stride(0),))
    return y


def tokens_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    grad_rows, x_rows, grad_x = as_rows(grad), as_rows(x), dense_like(x)
    grad_scale = dense_like(scale)
    rows, width = x_rows.shape
    plan = _tokens_plan(TOKENS, width, x.device, backward=True)
    tensors = grad_rows, x_rows, scale.contiguous(), grad_x, grad_scale
    plan.launch((min(-(-rows // plan.rows), plan.most), 1, 1), tensors, (rows,), (grad_rows.stride(0), x_rows.stride(0)))
    return grad_x, grad_scale


@dataclass(frozen=True)
class _Plan:
    """How rows of one width are worked on: a kernel's launcher, tiles of so many rows and columns, programs (of a strip) at most."""

    launch: Launcher
    rows: int
    columns: int
    most: int


@functools.cache
def _tokens_plan(tiling: Tiling, width: int, device: torch.device, backward: bool = False) -> _Plan:
    rows, columns, warps = tiling.tile(width)
    constants = dict(WIDTH=width, R=rows, C=columns, STAGES=tiling.stages, num_warps=warps)
    launch = Launcher(tokens_backward_kernel if backward else tokens_forward_kernel, **constants)
    return _Plan(launch, rows, columns, tiling.programs(warps, device))


@functools.cache
def _plan(tiling: Tiling, width: int, grouped: bool, device: torch.device, backward: bool = False) -> _Plan:
    rows, columns, warps = tiling.strip(width)
    constants = dict(R=rows, C=columns, GROUPED=grouped, STAGES=tiling.stages, num_warps=warps)
    launch = Launcher(backward_kernel if backward else forward_kernel, **constants)
    return _Plan(launch, rows, columns, max(1, tiling.programs(warps, device) // -(-width // columns)))


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
    height, _ = _pieces(x, _plan(GROUPS, x.size(-1), True, x.device))
    rows_of = np.asarray(sizes, dtype=np.int32)
    pieces_of = -(-rows_of // height)
    starts, ends = np.append(0, pieces_of.cumsum()), rows_of.cumsum()
    group = np.repeat(np.arange(len(sizes)), pieces_of)
    first = (ends - rows_of)[group] + (np.arange(len(group)) - starts[group]) * height
    host = torch.empty(3 * len(group) + len(starts), dtype=torch.int32, pin_memory=x.is_cuda)
    np.concatenate((group, first, np.minimum(first + height, ends[group]), starts), out=host.numpy(), casting="same_kind")
    return Groups(host.to(x.device, non_blocking=True), len(group))


def _pieces(x: Tensor, plan: _Plan) -> tuple[int, int]:
    """Rows of a piece, whole tiles, so that there are about as many programs as the plan wants; and how many pieces."""
    rows = x.numel() // x.size(-1)
    height = -(-rows // (plan.most * plan.rows)) * plan.rows
    return height, -(-rows // height)


def _forward(x: Tensor, scale: Tensor, factor: float, plan: _Plan, height: int, pieces: int, table: Tensor | None = None) -> Tensor:
    x_rows, y = as_rows(x), dense_like(x)
    rows, width = x_rows.shape
    tensors = x_rows, scale.contiguous(), y, table
    plan.launch((-(-width // plan.columns), pieces, 1), tensors, (rows, height, float(factor)), (width, x_rows.stride(0)))
    return y


def _backward(
    grad: Tensor, x: Tensor, scale: Tensor, factor: float, plan: _Plan, height: int, pieces: int, table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and each piece's part of the scale's [pieces, width]."""
    grad_rows, x_rows, grad_x = as_rows(grad), as_rows(x), dense_like(x)
    rows, width = x_rows.shape
    partial = torch.empty(pieces, width, dtype=torch.float32, device=x.device)
    tensors = grad_rows, x_rows, scale.contiguous(), grad_x, partial, table
    special = width, grad_rows.stride(0), x_rows.stride(0)
    plan.launch((-(-width // plan.columns), pieces, 1), tensors, (rows, height, float(factor)), special)
    return grad_x, partial
