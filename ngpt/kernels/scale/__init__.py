"""Products with trained scales, forward and backward, each in one read of its inputs.

CUDA tensors go through Triton kernels, all others (including fp64) through plain torch. Both compute in fp32 and round once;
`ngpt.functional.scale` has the autograd functions.
"""

from torch import Tensor

from ngpt.kernels.rows import MAX_WIDTH, kernels_take
from ngpt.kernels.scale import eager

__all__ = ["features_backward", "features_forward", "tokens_backward", "tokens_forward"]


def features_forward(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    """[..., F] times the [F] of scale * factor, in x's dtype."""
    return _of_features(x, scale).features_forward(x, scale, factor)


def features_backward(grad: Tensor, x: Tensor, scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the scale."""
    return _of_features(x, scale).features_backward(grad, x, scale, factor)


def tokens_forward(x: Tensor, scale: Tensor) -> Tensor:
    """[T, F] times [T], in x's dtype."""
    return _of_tokens(x, scale).tokens_forward(x, scale)


def tokens_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the scale."""
    return _of_tokens(x, scale).tokens_backward(grad, x, scale)


def _of_features(x: Tensor, scale: Tensor):
    return _triton() if scale.shape == x.shape[-1:] and kernels_take(x, fp32=(scale,)) else eager


def _of_tokens(x: Tensor, scale: Tensor):
    fits = scale.shape == x.shape[:-1] and x.size(-1) <= MAX_WIDTH
    return _triton() if fits and kernels_take(x, fp32=(scale,)) else eager


def _triton():
    from ngpt.kernels.scale import triton  # here, since triton may be missing where there is no CUDA

    return triton
