"""Launch the Triton kernels, on CUDA or in Triton's interpreter. Functions as in `eager`, for tensors with elements and dim == -1."""

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from ngpt.kernels.normalize.eager import EPSILON, group_sum, is_split
from ngpt.kernels.normalize.kernels import GIVE, OWN, TAKE, backward_kernel, forward_kernel, lerp_backward_kernel, lerp_forward_kernel
from ngpt.kernels.rows import Tiling, as_rows

FORWARD = Tiling(warps=4, elements=16, resident=64)
BACKWARD = Tiling(warps=4, elements=16, resident=64)
SCALED_BACKWARD = Tiling(warps=4, elements=16, resident=12, stages=3)
LERP_FORWARD = Tiling(warps=4, elements=16, resident=32)
LERP_BACKWARD = Tiling(warps=4, elements=8, resident=16, stages=2)


def l2_forward(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    return _forward(x, None, group)


def l2_backward(grad: Tensor, x: Tensor, inverse_norm: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    return _backward(grad, x, None, inverse_norm, group)[0]


def scaled_forward(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _forward(x, scale.contiguous(), None)


def scaled_backward(grad: Tensor, x: Tensor, scale: Tensor, inverse_norm: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(grad, x, scale.contiguous(), inverse_norm, None)


def lerp_forward(h: Tensor, b: Tensor, alpha: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    h_rows, b_rows, out = as_rows(h), as_rows(b), torch.empty(h.shape, dtype=h.dtype, device=h.device)
    (rows, width), inverse_norms = h_rows.shape, [_row_numbers(h) for _ in range(3)]
    height, columns, warps = LERP_FORWARD.tile(width)
    programs = min(triton.cdiv(rows, height), LERP_FORWARD.programs(warps, h.device))
    with torch.cuda.device_of(h):
        lerp_forward_kernel[(programs,)](
            h_rows,
            b_rows,
            alpha.contiguous(),
            out,
            *inverse_norms,
            rows,
            h_rows.stride(0),
            b_rows.stride(0),
            EPSILON=EPSILON,
            WIDTH=width,
            R=height,
            C=columns,
            STAGES=LERP_FORWARD.stages,
            num_warps=warps,
        )
    return out, tuple(inverse_norms)


def lerp_backward(
    grad: Tensor, h: Tensor, b: Tensor, alpha: Tensor, inverse_norms: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_rows, h_rows, b_rows = as_rows(grad), as_rows(h), as_rows(b)
    grad_h, grad_b = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (h, b))
    rows, width = h_rows.shape
    height, columns, warps = LERP_BACKWARD.tile(width)
    programs = min(triton.cdiv(rows, height), LERP_BACKWARD.programs(warps, h.device))
    partial = torch.empty(programs, width, device=h.device)
    with torch.cuda.device_of(h):
        lerp_backward_kernel[(programs,)](
            grad_rows,
            h_rows,
            b_rows,
            alpha.contiguous(),
            *inverse_norms,
            grad_h,
            grad_b,
            partial,
            rows,
            grad_rows.stride(0),
            h_rows.stride(0),
            b_rows.stride(0),
            WIDTH=width,
            R=height,
            C=columns,
            STAGES=LERP_BACKWARD.stages,
            num_warps=warps,
        )
    return grad_h, grad_b, partial.sum(0)


def _row_numbers(x: Tensor) -> Tensor:
    """fp32, one number a row, uninitialised."""
    return torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def _periods(rows: int, height: int, width: int, scale: Tensor | None, programs: int) -> tuple[int, int, tuple[int, int]]:
    """Rows after which the scales repeat at the same place of a tile, heads, and the grid of (loops over periods, tiles of a period)."""
    heads = scale.numel() // width if scale is not None else 1
    period = heads * max(1, height // heads)
    tiles = triton.cdiv(period, height)
    return period, heads, (min(triton.cdiv(rows, period), max(1, programs // tiles)), tiles)


def _forward(x: Tensor, scale: Tensor | None, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    x_rows, y, inverse_norm = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device), _row_numbers(x)
    rows, width = x_rows.shape
    height, columns, warps = FORWARD.tile(width)
    period, heads, grid = _periods(rows, height, width, scale, FORWARD.programs(warps, x.device))
    sums = _row_numbers(x) if is_split(group) else None

    def launch(part: int) -> None:
        with torch.cuda.device_of(x):
            forward_kernel[grid](
                x_rows,
                scale,
                y,
                sums,
                inverse_norm,
                rows,
                period,
                heads,
                x_rows.stride(0),
                EPSILON=EPSILON,
                WIDTH=width,
                R=height,
                C=columns,
                SCALED=scale is not None,
                SUMS=part,
                STAGES=FORWARD.stages,
                num_warps=warps,
            )

    _in_parts(launch, sums, group)
    return y, inverse_norm


def _backward(
    grad: Tensor, x: Tensor, scale: Tensor | None, inverse_norm: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    grad_rows, x_rows, grad_x = as_rows(grad), as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = x_rows.shape
    tiling = BACKWARD if scale is None else SCALED_BACKWARD
    height, columns, warps = tiling.tile(width)
    period, heads, grid = _periods(rows, height, width, scale, tiling.programs(warps, x.device))
    sums = _row_numbers(x) if is_split(group) else None
    partial = None if scale is None else torch.empty(grid[0], period, width, device=x.device)

    def launch(part: int) -> None:
        with torch.cuda.device_of(x):
            backward_kernel[grid](
                grad_rows,
                x_rows,
                scale,
                inverse_norm,
                grad_x,
                sums,
                partial,
                rows,
                period,
                heads,
                grad_rows.stride(0),
                x_rows.stride(0),
                WIDTH=width,
                R=height,
                C=columns,
                SCALED=scale is not None,
                SUMS=part,
                STAGES=tiling.stages,
                num_warps=warps,
            )

    _in_parts(launch, sums, group)
    return grad_x, None if scale is None else partial.view(-1, heads * width).sum(0).view(scale.shape)


def _in_parts(launch, sums: Tensor | None, group: dist.ProcessGroup | None) -> None:
    """One kernel; or, where ranks share the rows, one for their sums, the all-reduce, and one that applies them."""
    if sums is None:
        launch(OWN.value)
    else:
        launch(GIVE.value)
        group_sum(sums, group)
        launch(TAKE.value)
