"""L2 normalisation and the residual step on the unit hypersphere, with hand-written backward passes.

Autograd of the plain formulas would keep several fp32 copies of the activations alive; these functions save tensors of the input's
dtype and one fp32 number a row.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ngpt.kernels import normalize
from ngpt.kernels.normalize import EPSILON

__all__ = ["EPSILON", "l2_normalize", "lerp_retract"]


class _L2Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
        y, inverse_norm = normalize.l2_forward(x, dim, group)
        ctx.save_for_backward(x, inverse_norm)
        ctx.dim, ctx.group = dim, group
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        return normalize.l2_backward(grad, *ctx.saved_tensors, ctx.dim, ctx.group), None, None


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


class _LerpRetract(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, b: Tensor, alpha: Tensor, factor: float) -> Tensor:
        out, inverse_norms = normalize.lerp_forward(h, b, alpha, factor)
        ctx.save_for_backward(h, b, alpha, inverse_norms)
        ctx.factor = factor
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        h, b, alpha, inverse_norms = ctx.saved_tensors
        return *normalize.lerp_backward(grad, h, b, alpha, ctx.factor, inverse_norms), None


def lerp_retract(h: Tensor, b: Tensor, alpha: Tensor, factor: float = 1.0) -> Tensor:
    """The residual step of nGPT: h <- l2_normalize(g + |alpha * factor| * (l2_normalize(b) - g)) with g = l2_normalize(h).

    A linear interpolation followed by a retraction to the sphere, not a geodesic step.

    Args:
        h: [..., D] hidden states, any floating dtype.
        b: [..., D] output of the sub-block, h's dtype.
        alpha: [D] eigen learning rates, fp32, times factor.
        factor: what the stored rates are multiplied by, see `ScaledParameter`.

    Returns:
        [..., D] in h's dtype, unit norm along D. All arithmetic is fp32 (fp64 for fp64).

    Source: MODEL.md "Residual step"; arXiv 2410.01131 equations 10 and 11.
    """
    return _LerpRetract.apply(h, b, alpha, factor)
