"""Cross entropy in plain torch, a block of rows at a time: the path of a CPU and of fp64; the kernels are compared with it."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_ELEMENTS = 1 << 24  # bytes of fp32 temporaries at a time


def forward(x_TV: Tensor, scale: Tensor | None, factor: float, targets_T: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward` of the package: the three of `Statistics`."""
    largest, total, picked = (x_TV.new_empty(x_TV.size(0), dtype=_dtype(x_TV)) for _ in range(3))
    for rows, logits in _scaled(x_TV, scale, factor, columns):
        top = logits.amax(-1) if columns else torch.full_like(total[rows], -torch.inf)
        here = (targets_T[rows] >= 0) & (targets_T[rows] < columns)
        place = targets_T[rows].where(here, 0)[:, None]
        picked[rows] = logits.gather(1, place)[:, 0].where(here, 0) if columns else 0
        largest[rows], total[rows] = top, logits.sub_(top[:, None]).exp2_().sum(-1)
    return largest, total, picked


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
    grad_scale = None if scale is None else torch.zeros_like(scale)
    behind = scale_of_grad if scale_of_grad is not None else factor if scale is None else scale * factor
    for rows, logits in _scaled(x_TV, scale, factor, columns):
        grad = logits.sub_(largest_T[rows, None]).exp2_().div_(total_T[rows, None])
        here = ((targets_T[rows] >= 0) & (targets_T[rows] < columns)).nonzero()[:, 0]
        grad[here, targets_T[rows][here]] -= 1
        grad *= grad_T[rows, None]
        if scale is not None:
            grad_scale[:columns] += (grad * x_TV[rows, :columns]).sum(0)
        x_TV[rows, :columns] = grad.mul_(behind[:columns] if isinstance(behind, Tensor) else behind)
    x_TV[:, columns:] = 0
    return x_TV, None if scale is None else grad_scale.mul_(factor)


def _scaled(x_TV: Tensor, scale: Tensor | None, factor: float, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, and a copy of their scaled logits that count, in units of log 2."""
    height = max(1, _ELEMENTS // max(1, x_TV.size(1)))
    for first in range(0, x_TV.size(0), height):
        rows = slice(first, first + height)
        logits = x_TV[rows, :columns].to(_dtype(x_TV), copy=True)
        units = factor / math.log(2)
        yield rows, logits.mul_(units if scale is None else scale[:columns] * units)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
