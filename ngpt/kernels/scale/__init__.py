"""Products with trained scales, forward and backward, each in one read of its inputs.

CUDA tensors go through Triton kernels, others (also fp64) through plain torch. Both compute in fp32 and round once;
`ngpt.functional.scale` has the autograd functions.
"""

from torch import Tensor

from ngpt.kernels.rows import MAX_WIDTH, kernels_take
from ngpt.kernels.scale import eager

__all__ = ["features_backward", "features_forward", "groups_backward", "groups_forward", "tokens_backward", "tokens_forward"]


def features_forward(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    """[..., F] times the [F] of scale * factor, in x's dtype."""
    return _of_features(x, scale).features_forward(x, scale, factor)


def features_backward(grad: Tensor, x: Tensor, scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the scale."""
    return _of_features(x, scale).features_backward(grad, x, scale, factor)


def groups_forward(x: Tensor, scale: Tensor, factor: float, sizes: list[int]) -> tuple[Tensor, object]:
    """Consecutive rows of [T, F] in groups, each times its row of the [G, F] of scale * factor; and what the backward pass wants to know
    of the sizes.
    """
    return _of_groups(x, scale).groups_forward(x, scale, factor, sizes)


def groups_backward(grad: Tensor, x: Tensor, scale: Tensor, factor: float, groups: object) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the scales; `groups` from the forward pass."""
    return _of_groups(x, scale).groups_backward(grad, x, scale, factor, groups)


def tokens_forward(x: Tensor, scale: Tensor) -> Tensor:
    """[T, F] times [T], in x's dtype."""
    return _of_tokens(x, scale).tokens_forward(x, scale)


def tokens_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the scale."""
    return _of_tokens(x, scale).tokens_backward(grad, x, scale)


def _of_features(x: Tensor, scale: Tensor):
    return _triton() if scale.shape == x.shape[-1:] and kernels_take(x, fp32=(scale,)) else eager


def _of_groups(x: Tensor, scale: Tensor):
    fits = x.dim() == 2 and scale.shape[1:] == x.shape[1:]
    return _triton() if fits and kernels_take(x, fp32=(scale,)) else eager


def _of_tokens(x: Tensor, scale: Tensor):
    fits = scale.shape == x.shape[:-1] and x.size(-1) <= MAX_WIDTH
    return _triton() if fits and kernels_take(x, fp32=(scale,)) else eager


def _triton():
    from ngpt.kernels.scale import triton  # not where there is no CUDA: triton may be missing there

    return triton
