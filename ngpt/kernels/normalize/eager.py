"""The formulas in plain torch: the path of a CPU, of fp64 and of dimensions other than the last; the kernels are compared with it."""

import torch
import torch.distributed as dist
from torch import Tensor

# The one epsilon, inside the root: x * rsqrt(sum(x^2) + EPSILON). A zero row gives zero and a finite gradient.
EPSILON = 1e-12


def group_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the ranks that hold the other features, in place."""
    if is_split(group):
        dist.all_reduce(x, group=group)
    return x


def is_split(group: dist.ProcessGroup | None) -> bool:
    return group is not None and group.size() > 1


def l2_forward(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    wide = widened(x)
    inverse_norm = inverse_norm_of(wide, dim, group)
    return (wide * inverse_norm).to(x.dtype), inverse_norm


def l2_backward(grad: Tensor, x: Tensor, inverse_norm: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    return project_out(widened(grad), widened(x) * inverse_norm, inverse_norm, dim, group).to(x.dtype)


def lerp_forward(h: Tensor, b: Tensor, alpha: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    wide_h, wide_b = widened(h), widened(b)
    inverse_h, inverse_b = inverse_norm_of(wide_h, -1), inverse_norm_of(wide_b, -1)
    g = wide_h * inverse_h
    step = g + (alpha * factor).abs() * (wide_b * inverse_b - g)
    inverse_step = inverse_norm_of(step, -1)
    return (step * inverse_step).to(h.dtype), torch.stack((inverse_h, inverse_b, inverse_step))


def lerp_backward(grad: Tensor, h: Tensor, b: Tensor, alpha: Tensor, factor: float, inverse_norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inverse_h, inverse_b, inverse_step = inverse_norms
    alpha = alpha * factor
    g, unit_b, rate = widened(h) * inverse_h, widened(b) * inverse_b, alpha.abs()
    delta = unit_b - g
    out = (g + rate * delta) * inverse_step
    grad_step = project_out(widened(grad), out, inverse_step, -1)
    grad_alpha = (grad_step * delta).flatten(0, -2).sum(0) * alpha.sign() * factor
    grad_h = project_out(grad_step * (1 - rate), g, inverse_h, -1)
    grad_b = project_out(grad_step * rate, unit_b, inverse_b, -1)
    return grad_h.to(h.dtype), grad_b.to(b.dtype), grad_alpha.to(alpha.dtype)


def inverse_norm_of(x: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """fp32 1 / sqrt(sum x^2 + EPSILON) along `dim` (kept), for fp32 or fp64 `x`."""
    return torch.rsqrt(group_sum(x.square().sum(dim, keepdim=True), group) + EPSILON)


def widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def project_out(grad: Tensor, unit: Tensor, inverse_norm: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Gradient of x -> x * inverse_norm(x): the part of `grad` orthogonal to `unit`, over the norm of x."""
    radial = group_sum((grad * unit).sum(dim, keepdim=True), group)
    return (grad - unit * radial) * inverse_norm
