"""L2 normalisation and the residual step on the unit hypersphere, with hand-written backward passes.

Autograd of the plain formulas would keep several fp32 copies of the activations alive; these functions save tensors of the input's
dtype and one fp32 number a row.
"""

import torch
import torch.distributed as dist
from torch import Tensor

# The one epsilon, inside the root: x * rsqrt(sum(x^2) + EPSILON). A zero row gives zero and a finite gradient.
EPSILON = 1e-12


def _group_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, group=group)
    return x


def _inverse_norm(x: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """fp32 1 / sqrt(sum x^2 + EPSILON) along `dim` (kept), for fp32 or fp64 `x`."""
    return torch.rsqrt(_group_sum(x.square().sum(dim, keepdim=True), group) + EPSILON)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _project_out(grad: Tensor, unit: Tensor, inverse_norm: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Gradient of x -> x * inverse_norm(x): the part of `grad` orthogonal to `unit`, over the norm of x."""
    radial = _group_sum((grad * unit).sum(dim, keepdim=True), group)
    return (grad - unit * radial) * inverse_norm


class _L2Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
        wide = _wide(x)
        inverse_norm = _inverse_norm(wide, dim, group)
        ctx.save_for_backward(x, inverse_norm)
        ctx.dim, ctx.group = dim, group
        return (wide * inverse_norm).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, inverse_norm = ctx.saved_tensors
        unit = _wide(x) * inverse_norm
        return _project_out(_wide(grad), unit, inverse_norm, ctx.dim, ctx.group).to(x.dtype), None, None


def l2_normalize(x: Tensor, dim: int = -1, group: dist.ProcessGroup | None = None) -> Tensor:
    """x * rsqrt(sum(x^2, dim) + EPSILON), computed in fp32 (fp64 for fp64), returned in x's dtype.

    Args:
        x: any shape and floating dtype.
        dim: the dimension that gets unit norm.
        group: process group over which `dim` is sharded. The sum of squares (forward) and the radial part of the gradient
            (backward) are all-reduced over it: two messages of x.numel() / x.size(dim) fp32 numbers.

    Returns:
        Tensor of x's shape and dtype.

    Source: MODEL.md "Notation"; arXiv 2410.01131 section 2.
    """
    return _L2Normalize.apply(x, dim, group)


class _ScaledL2Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        wide = _wide(x)
        inverse_norm = _inverse_norm(wide, -1)
        ctx.save_for_backward(x, scale, inverse_norm)
        return (wide * inverse_norm * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale, inverse_norm = ctx.saved_tensors
        unit, wide_grad = _wide(x) * inverse_norm, _wide(grad)
        grad_scale = (wide_grad * unit).sum_to_size(scale.shape)
        return _project_out(wide_grad * scale, unit, inverse_norm, -1).to(x.dtype), grad_scale


def scaled_l2_normalize(x: Tensor, scale: Tensor) -> Tensor:
    """scale * l2_normalize(x) along the last dimension, rounded to x's dtype once.

    Args:
        x: [..., K], any floating dtype.
        scale: fp32 (fp64 for fp64), broadcastable to x's shape.

    Returns:
        Tensor of x's shape and dtype.

    Source: MODEL.md "Attention" (sqk on the queries).
    """
    return _ScaledL2Normalize.apply(x, scale)


class _LerpRetract(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, b: Tensor, alpha: Tensor) -> Tensor:
        wide_h, wide_b = _wide(h), _wide(b)
        inverse_h, inverse_b = _inverse_norm(wide_h, -1), _inverse_norm(wide_b, -1)
        g = wide_h * inverse_h
        step = g + alpha.abs() * (wide_b * inverse_b - g)
        inverse_step = _inverse_norm(step, -1)
        ctx.save_for_backward(h, b, alpha, inverse_h, inverse_b, inverse_step)
        return (step * inverse_step).to(h.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        h, b, alpha, inverse_h, inverse_b, inverse_step = ctx.saved_tensors
        g, unit_b, rate = _wide(h) * inverse_h, _wide(b) * inverse_b, alpha.abs()
        delta = unit_b - g
        out = (g + rate * delta) * inverse_step
        grad_step = _project_out(_wide(grad), out, inverse_step, -1)
        grad_alpha = (grad_step * delta).flatten(0, -2).sum(0) * alpha.sign()
        grad_h = _project_out(grad_step * (1 - rate), g, inverse_h, -1)
        grad_b = _project_out(grad_step * rate, unit_b, inverse_b, -1)
        return grad_h.to(h.dtype), grad_b.to(b.dtype), grad_alpha.to(alpha.dtype)


def lerp_retract(h: Tensor, b: Tensor, alpha: Tensor) -> Tensor:
    """The residual step of nGPT: h <- l2_normalize(g + |alpha| * (l2_normalize(b) - g)) with g = l2_normalize(h).

    A linear interpolation followed by a retraction to the sphere, not a geodesic step.

    Args:
        h: [..., D] hidden states, any floating dtype.
        b: [..., D] output of the sub-block, h's dtype.
        alpha: [D] effective eigen learning rates, fp32.

    Returns:
        [..., D] in h's dtype, unit norm along D. All arithmetic is fp32 (fp64 for fp64).

    Source: MODEL.md "Residual step"; arXiv 2410.01131 equations 10 and 11.
    """
    return _LerpRetract.apply(h, b, alpha)
