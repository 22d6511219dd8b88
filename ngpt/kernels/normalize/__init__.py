"""L2 normalisation and the residual step: forward and backward.

Each pass reads its inputs once, or twice where ranks share the features of a row.

CUDA tensors go through Triton kernels, all others (including fp64, rows wider than `MAX_WIDTH`, dimensions other than the last)
through plain torch. Both compute in fp32 and round once; `ngpt.functional.normalize` has the mathematics and the autograd functions.
"""

import torch.distributed as dist
from torch import Tensor

from ngpt.kernels.normalize import eager
from ngpt.kernels.normalize.eager import EPSILON
from ngpt.kernels.rows import MAX_WIDTH, kernels_take

__all__ = ["EPSILON", "l2_backward", "l2_forward", "lerp_backward", "lerp_forward"]


def l2_forward(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """y in x's dtype, and the inverse norms, for the backward pass alone: fp32, or fp64 for fp64."""
    return _of_rows(x, dim).l2_forward(x, dim, group)


def l2_backward(grad: Tensor, x: Tensor, inverse_norm: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """Gradient of x, in its dtype."""
    return _of_rows(x, dim).l2_backward(grad, x, inverse_norm, dim, group)


def lerp_forward(h: Tensor, b: Tensor, alpha: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The residual step with rates |alpha * factor|, in h's dtype, and three inverse norms a row: of h, of b and of the step."""
    return _of_step(h, b, alpha).lerp_forward(h, b, alpha, factor)


def lerp_backward(grad: Tensor, h: Tensor, b: Tensor, alpha: Tensor, factor: float, inverse_norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, b and alpha, in their dtypes."""
    return _of_step(h, b, alpha).lerp_backward(grad, h, b, alpha, factor, inverse_norms)


def _of_rows(x: Tensor, dim: int):
    last = dim in (-1, x.dim() - 1)
    return _triton() if last and kernels_take(x) and x.size(-1) <= MAX_WIDTH else eager


def _of_step(h: Tensor, b: Tensor, alpha: Tensor):
    fits = h.shape == b.shape and alpha.shape == h.shape[-1:]
    return _of_rows(h, -1) if fits and kernels_take(h, b, fp32=(alpha,)) else eager


def _triton():
    from ngpt.kernels.normalize import triton  # here, since triton may be missing where there is no CUDA

    return triton
