"""Launch the Triton kernels, on CUDA or in Triton's interpreter. Functions as in `eager`, for tensors with elements."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ngpt.kernels.launch import Launcher
from ngpt.kernels.rows import Tiling, as_rows, dense_like, height_of_pieces
from ngpt.kernels.scale.kernels import backward_kernel, forward_kernel, tokens_backward_kernel, tokens_forward_kernel

FORWARD = Tiling(warps=4, elements=32, resident=48)
BACKWARD = Tiling(warps=4, elements=32, resident=16)
TOKENS = Tiling(warps=4, elements=16, resident=64)


def features_forward(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    x_rows, y = as_rows(x), dense_like(x)
    rows, width = x_rows.shape
    plan = _plan(FORWARD, width, x.device)
    height = height_of_pieces(rows, plan.rows, plan.most)
    pieces = -(-rows // height)
    plan.launch(
        (-(-width // plan.columns), pieces, 1), (x_rows, scale.contiguous(), y), (rows, height, float(factor)), (width, x_rows.stride(0))
    )
    return y


def features_backward(grad: Tensor, x: Tensor, scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    grad_rows, x_rows, grad_x = as_rows(grad), as_rows(x), dense_like(x)
    rows, width = x_rows.shape
    plan = _plan(BACKWARD, width, x.device, backward=True)
    height = height_of_pieces(rows, plan.rows, plan.most)
    pieces = -(-rows // height)
    partial = torch.empty(pieces, width, dtype=torch.float32, device=x.device)
    tensors = grad_rows, x_rows, scale.contiguous(), grad_x, partial
    special = width, grad_rows.stride(0), x_rows.stride(0)
    plan.launch((-(-width // plan.columns), pieces, 1), tensors, (rows, height, float(factor)), special)
    return grad_x, partial.sum(0)


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
    """How rows of one width are handled: the kernel's launcher, rows and columns of a tile, and the most programs of a strip."""

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
def _plan(tiling: Tiling, width: int, device: torch.device, backward: bool = False) -> _Plan:
    rows, columns, warps = tiling.strip(width)
    constants = dict(R=rows, C=columns, STAGES=tiling.stages, num_warps=warps)
    launch = Launcher(backward_kernel if backward else forward_kernel, **constants)
    return _Plan(launch, rows, columns, max(1, tiling.programs(warps, device) // -(-width // columns)))
