"""Launch the Triton kernels, on CUDA or in Triton's interpreter. Functions as in `eager`, for tensors with elements and dim == -1."""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ngpt.kernels.launch import Launcher
from ngpt.kernels.normalize.eager import EPSILON, group_sum, is_split
from ngpt.kernels.normalize.kernels import GIVE, OWN, TAKE, backward_kernel, forward_kernel, lerp_backward_kernel, lerp_forward_kernel
from ngpt.kernels.rows import Tiling, as_rows, dense_like

FORWARD = Tiling(warps=4, elements=16, resident=64)
BACKWARD = Tiling(warps=4, elements=16, resident=64)
SCALED_BACKWARD = Tiling(warps=4, elements=16, resident=12, stages=3)
LERP_FORWARD = Tiling(warps=4, elements=16, resident=32, stages=3, widest=32)
LERP_BACKWARD = Tiling(warps=4, elements=16, resident=8, stages=3, widest=32)


def l2_forward(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    return _forward(x, None, 1.0, False, group)


def l2_backward(grad: Tensor, x: Tensor, inverse_norm: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    return _backward(grad, x, None, 1.0, False, inverse_norm, group)[0]


def scaled_forward(x: Tensor, scale: Tensor, factor: float, squared: bool) -> tuple[Tensor, Tensor]:
    return _forward(x, scale.contiguous(), factor, squared, None)


def scaled_backward(
    grad: Tensor, x: Tensor, scale: Tensor, factor: float, squared: bool, inverse_norm: Tensor
) -> tuple[Tensor, Tensor | None]:
    return _backward(grad, x, scale.contiguous(), factor, squared, inverse_norm, None)


def lerp_forward(h: Tensor, b: Tensor, alpha: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    h_rows, b_rows, out = as_rows(h), as_rows(b), dense_like(h)
    rows, width = h_rows.shape
    plan = _lerp_plan(LERP_FORWARD, width, h.device)
    inverse_norms = torch.empty(3, rows, dtype=torch.float32, device=h.device)
    tensors = h_rows, b_rows, alpha.contiguous(), out, inverse_norms
    plan.launch((plan.programs(rows), 1, 1), tensors, (rows, float(factor)), (h_rows.stride(0), b_rows.stride(0)))
    return out, inverse_norms


def lerp_backward(grad: Tensor, h: Tensor, b: Tensor, alpha: Tensor, factor: float, inverse_norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_rows, h_rows, b_rows = as_rows(grad), as_rows(h), as_rows(b)
    grad_h, grad_b = dense_like(h), dense_like(b)
    rows, width = h_rows.shape
    plan = _lerp_plan(LERP_BACKWARD, width, h.device, backward=True)
    programs = plan.programs(rows)
    partial = torch.empty(programs, width, dtype=torch.float32, device=h.device)
    tensors = grad_rows, h_rows, b_rows, alpha.contiguous(), inverse_norms, grad_h, grad_b, partial
    special = grad_rows.stride(0), h_rows.stride(0), b_rows.stride(0)
    plan.launch((programs, 1, 1), tensors, (rows, float(factor)), special)
    return grad_h, grad_b, partial.sum(0)


@dataclass(frozen=True)
class _Plan:
    """How rows of one width are worked on.

    Attributes:
        launch: of the kernel.
        period: rows after which a program's tiles repeat: the scales of all heads lie at the same place again.
        tiles: programs that share a period.
        most: programs that loop over periods, at most.
    """

    launch: Launcher
    period: int
    tiles: int
    most: int

    def programs(self, rows: int) -> int:
        return min(-(-rows // self.period), self.most)


@functools.cache
def _lerp_plan(tiling: Tiling, width: int, device: torch.device, backward: bool = False) -> _Plan:
    height, columns, warps = tiling.tile(width)
    constants = dict(WIDTH=width, R=height, C=columns, STAGES=tiling.stages, num_warps=warps)
    launch = Launcher(lerp_backward_kernel, **constants) if backward else Launcher(lerp_forward_kernel, EPSILON=EPSILON, **constants)
    return _Plan(launch, height, 1, tiling.programs(warps, device))


@functools.cache
def _plan(tiling: Tiling, width: int, heads: int | None, squared: bool, part: int, device: torch.device, backward: bool = False) -> _Plan:
    """heads: of the scale, None without one. part: what to do about sums that ranks share."""
    height, columns, warps = tiling.tile(width)
    constants = dict(WIDTH=width, R=height, C=columns, SCALED=heads is not None, SQUARED=squared, SUMS=part)
    constants |= dict(STAGES=tiling.stages, num_warps=warps)
    launch = Launcher(backward_kernel, **constants) if backward else Launcher(forward_kernel, EPSILON=EPSILON, **constants)
    period = (heads or 1) * max(1, height // (heads or 1))
    tiles = -(-period // height)
    return _Plan(launch, period, tiles, max(1, tiling.programs(warps, device) // tiles))


def _forward(x: Tensor, scale: Tensor | None, factor: float, squared: bool, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    x_rows, y = as_rows(x), dense_like(x)
    rows, width = x_rows.shape
    heads = None if scale is None else scale.numel() // width
    inverse_norm = torch.empty(rows, dtype=torch.float32, device=x.device)
    sums = shared_sums(x, group)

    def launch(part: int) -> None:
        plan = _plan(FORWARD, width, heads, squared, part, x.device)
        grid, special = (plan.programs(rows), plan.tiles, 1), (plan.period, heads or 1, x_rows.stride(0))
        plan.launch(grid, (x_rows, scale, y, sums, inverse_norm), (rows, float(factor)), special)

    in_parts(launch, sums, group)
    return y, inverse_norm


def _backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    factor: float,
    squared: bool,
    inverse_norm: Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor | None]:
    grad_rows, x_rows, grad_x = as_rows(grad), as_rows(x), dense_like(x)
    rows, width = x_rows.shape
    heads, tiling = (None, BACKWARD) if scale is None else (scale.numel() // width, SCALED_BACKWARD)
    sums, partial = shared_sums(x, group), None
    if scale is not None:
        whole = _plan(tiling, width, heads, squared, OWN.value, x.device, backward=True)
        partial = torch.empty(whole.programs(rows), whole.period, width, dtype=torch.float32, device=x.device)

    def launch(part: int) -> None:
        plan = _plan(tiling, width, heads, squared, part, x.device, backward=True)
        grid, special = (plan.programs(rows), plan.tiles, 1), (plan.period, heads or 1, grad_rows.stride(0), x_rows.stride(0))
        plan.launch(grid, (grad_rows, x_rows, scale, inverse_norm, grad_x, sums, partial), (rows, float(factor)), special)

    in_parts(launch, sums, group)
    return grad_x, None if scale is None else partial.view(-1, heads * width).sum(0).view(scale.shape)


def shared_sums(x: Tensor, group: dist.ProcessGroup | None) -> Tensor | None:
    """fp32, one number a row, uninitialised; None where no other rank holds part of the rows."""
    return torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device) if is_split(group) else None


def in_parts(launch, sums: Tensor | None, group: dist.ProcessGroup | None) -> None:
    """One kernel; or, where ranks share the rows, one for their sums, the all-reduce, and one that applies them."""
    if sums is None:
        launch(OWN.value)
    else:
        launch(GIVE.value)
        group_sum(sums, group)
        launch(TAKE.value)
