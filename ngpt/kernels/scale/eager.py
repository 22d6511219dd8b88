"""The products in plain torch: the path of a CPU and of fp64. The kernels are compared with it."""

import torch
from torch import Tensor

# Rows that one step of the scale's gradient reads at once: bounds its fp32 temporaries to ROWS * features numbers.
_ROWS = 1024


def features_forward(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    return torch.mul(x, scale * factor, out=torch.empty_like(x))  # computed in fp32, rounded once, no fp32 temporary


def features_backward(grad: Tensor, x: Tensor, scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    grad_scale = torch.zeros_like(scale)
    for grad_rows, x_rows in zip(grad.flatten(0, -2).split(_ROWS), x.flatten(0, -2).split(_ROWS), strict=True):
        grad_scale += (grad_rows.to(scale.dtype) * x_rows).sum(0)
    return torch.mul(grad, scale * factor, out=torch.empty_like(x)), grad_scale.mul_(factor)


def tokens_forward(x: Tensor, scale: Tensor) -> Tensor:
    return torch.mul(x, scale[:, None], out=torch.empty_like(x))


def tokens_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    grad_scale = torch.empty_like(scale)
    for grad_rows, x_rows, out in zip(grad.split(_ROWS), x.split(_ROWS), grad_scale.split(_ROWS), strict=True):
        out.copy_((grad_rows.to(scale.dtype) * x_rows).sum(-1))
    return torch.mul(grad, scale[:, None], out=torch.empty_like(x)), grad_scale
