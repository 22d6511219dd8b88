"""Launch the Triton kernels, on CUDA or in Triton's interpreter. Functions as in `eager`, for tensors with elements and dim == -1."""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from ngpt.kernels.device import GIVE, OWN, TAKE
from ngpt.kernels.launch import Launcher
from ngpt.kernels.normalize.eager import EPSILON, group_sum, is_split
from ngpt.kernels.normalize.kernels import backward_kernel, forward_kernel, lerp_backward_kernel, lerp_forward_kernel
from ngpt.kernels.rows import Tiling, as_rows, dense_like

FORWARD = Tiling(warps=4, elements=16, resident=64)
BACKWARD = Tiling(warps=4, elements=16, resident=64)
LERP_FORWARD = Tiling(warps=4, elements=16, resident=32, widest=32)
LERP_BACKWARD = Tiling(warps=4, elements=16, resident=8, stages=3, widest=32)


def l2_forward(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    x_rows, y = as_rows(x), dense_like(x)
    rows, width = x_rows.shape
    inverse_norm = torch.empty(rows, dtype=torch.float32, device=x.device)
    sums = shared_sums(x, group)

    def launch(part: int) -> None:
        plan = _plan(FORWARD, forward_kernel, width, x.device, SUMS=part, EPSILON=EPSILON)
        plan.launch((plan.programs(rows), 1, 1), (x_rows, y, sums, inverse_norm), (rows,), (x_rows.stride(0),))

    in_parts(launch, sums, group)
    return y, inverse_norm


def l2_backward(grad: Tensor, x: Tensor, inverse_norm: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    grad_rows, x_rows, grad_x = as_rows(grad), as_rows(x), dense_like(x)
    rows, width = x_rows.shape
    sums = shared_sums(x, group)

    def launch(part: int) -> None:
        plan = _plan(BACKWARD, backward_kernel, width, x.device, SUMS=part)
        tensors, strides = (grad_rows, x_rows, inverse_norm, grad_x, sums), (grad_rows.stride(0), x_rows.stride(0))
        plan.launch((plan.programs(rows), 1, 1), tensors, (rows,), strides)

    in_parts(launch, sums, group)
    return grad_x


def lerp_forward(h: Tensor, b: Tensor, alpha: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    h_rows, b_rows, out = as_rows(h), as_rows(b), dense_like(h)
    rows, width = h_rows.shape
    plan = _plan(LERP_FORWARD, lerp_forward_kernel, width, h.device, EPSILON=EPSILON)
    inverse_norms = torch.empty(3, rows, dtype=torch.float32, device=h.device)
    tensors = h_rows, b_rows, alpha.contiguous(), out, inverse_norms
    plan.launch((plan.programs(rows), 1, 1), tensors, (rows, float(factor)), (h_rows.stride(0), b_rows.stride(0)))
    return out, inverse_norms


def lerp_backward(grad: Tensor, h: Tensor, b: Tensor, alpha: Tensor, factor: float, inverse_norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_rows, h_rows, b_rows = as_rows(grad), as_rows(h), as_rows(b)
    grad_h, grad_b = dense_like(h), dense_like(b)
    rows, width = h_rows.shape
    plan = _plan(LERP_BACKWARD, lerp_backward_kernel, width, h.device, loads=_bytes(grad, h, b))
    programs = plan.programs(rows)
    partial = torch.empty(programs, width, dtype=torch.float32, device=h.device)
    tensors = grad_rows, h_rows, b_rows, alpha.contiguous(), inverse_norms, grad_h, grad_b, partial
    special = grad_rows.stride(0), h_rows.stride(0), b_rows.stride(0)
    plan.launch((programs, 1, 1), tensors, (rows, float(factor)), special)
    return grad_h, grad_b, partial.sum(0)


@dataclass(frozen=True)
class _Plan:
    """How rows of one width are handled: the kernel's launcher, rows of a tile, and the largest number of programs."""

    launch: Launcher
    height: int
    most: int

    def programs(self, rows: int) -> int:
        return min(-(-rows // self.height), self.most)


@functools.cache
def _plan(tiling: Tiling, kernel: triton.JITFunction, width: int, device: torch.device, loads: int = 0, **constants: float) -> _Plan:
    """loads: bytes of the numbers that a program loads for one place of its tile, where it loads ahead."""
    height, columns, warps = tiling.tile(width)
    stages = tiling.stages_for(loads * height * columns, device) if loads else 1
    launch = Launcher(kernel, **constants, WIDTH=width, R=height, C=columns, STAGES=stages, num_warps=warps)
    return _Plan(launch, height, tiling.programs(warps, device))


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.element_size() for tensor in tensors)


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
