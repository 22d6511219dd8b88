"""Cross entropy of scaled logits, forward in one read of them, backward in one read and one write in their place.

CUDA tensors go through Triton kernels, all others (including fp64) through plain torch. Both compute in fp32 (fp64 for fp64);
`ngpt.functional.cross_entropy` has the mathematics and the autograd function.
"""

from typing import NamedTuple

from torch import Tensor

from ngpt.kernels.cross_entropy import eager
from ngpt.kernels.rows import kernels_take

__all__ = ["Statistics", "backward_", "forward"]


class Statistics(NamedTuple):
    """Statistics of the scaled logits that count in each row: [T] fp32 (fp64 for fp64). Units are log 2: exp2 is one instruction.

    Attributes:
        largest: the largest; -inf where none counts.
        total: sum of exp2(logit - largest).
        picked: the target's logit; 0 where it is not among the columns.
    """

    largest: Tensor
    total: Tensor
    picked: Tensor


def forward(x_TV: Tensor, scale: Tensor | None, factor: float, targets_T: Tensor, columns: int) -> Statistics:
    """The statistics that make up each row's loss, over the first `columns` of its logits x * (scale * factor).

    Args:
        scale: [V] fp32 (fp64 for fp64); None: 1.
        targets_T: int64 column of each row; below 0 or from `columns` on: not here.
    """
    return Statistics(*_backend(x_TV, scale).forward(x_TV, scale, factor, targets_T, columns))


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
    """Gradients of x and of the scale. The gradient of x overwrites x where its rows are contiguous.

    Args:
        largest_T, total_T: as in `Statistics`, over all ranks.
        scale_of_grad: [V] in the scale's dtype that the gradient of the scaled logits is multiplied with; None: scale * factor.
    """
    return _backend(x_TV, scale).backward_(grad_T, x_TV, scale, factor, targets_T, columns, largest_T, total_T, scale_of_grad)


def _backend(x_TV: Tensor, scale: Tensor | None):
    if not kernels_take(x_TV, fp32=() if scale is None else (scale,)):
        return eager
    from ngpt.kernels.cross_entropy import triton  # here, since triton may be missing where there is no CUDA

    return triton
