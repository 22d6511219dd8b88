"""Queries, keys and values from the mixed projection in one pass, rotated and normalised on the way: forward and backward.

CUDA tensors go through Triton kernels, all others (including fp64, and heads wider than `MAX_WIDTH`) through plain torch. Both compute in
fp32 and round once; `ngpt.functional.rotary` has the mathematics and the autograd function.
"""

from torch import Tensor

from ngpt.kernels.rotary import eager
from ngpt.kernels.rows import kernels_take

__all__ = ["backward", "forward"]

MAX_WIDTH = 1024  # of a head: a tile holds whole ones


def forward(
    mixed: Tensor, heads: int, groups: int, angles: Tensor | None, scale: Tensor | None, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries [S, B, H, K], keys and values [S, B, G, K] in mixed's dtype, and the heads' inverse norms for `backward` alone.

    Args:
        mixed: [S, B, G * (H / G + 2) * K].
        angles: [S, 1, 1, R] fp32; None: nothing is rotated.
        scale: [H * K] fp32, of the queries; None: nothing is normalised, and there are no inverse norms.
    """
    return _backend(mixed, heads, groups, angles, scale).forward(mixed, heads, groups, angles, scale, factor)


def backward(
    grads: tuple[Tensor, Tensor, Tensor],
    mixed: Tensor | None,
    angles: Tensor | None,
    scale: Tensor | None,
    factor: float,
    inverse_norms: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of mixed and of the scale. mixed and inverse_norms: None where the scale is."""
    like = grads[0] if mixed is None else mixed
    heads, groups = grads[0].size(2), grads[1].size(2)
    return _backend(like, heads, groups, angles, scale).backward(grads, mixed, angles, scale, factor, inverse_norms)


def _backend(x: Tensor, heads: int, groups: int, angles: Tensor | None, scale: Tensor | None):
    parameters = tuple(tensor for tensor in (angles, scale) if tensor is not None)
    width = x.size(-1) if x.dim() == 4 else x.size(-1) // (heads + 2 * groups)
    return _triton() if width <= MAX_WIDTH and kernels_take(x, fp32=parameters) else eager


def _triton():
    from ngpt.kernels.rotary import triton  # here, since triton may be missing where there is no CUDA

    return triton
