"""Queries, keys and values from one projection, rotated by their positions and normalised."""

from torch import Tensor
from torch.autograd import Function

from ngpt.kernels import rotary as kernels


class _SplitHeads(Function):
    @staticmethod
    def forward(ctx, mixed, heads, groups, angles, scale, factor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, inverse_norms = kernels.forward(mixed, heads, groups, angles, scale, factor)
        ctx.save_for_backward(None if scale is None else mixed, angles, scale, inverse_norms)
        ctx.factor = factor
        return q, k, v

    @staticmethod
    def backward(ctx, *grads: Tensor):
        mixed, angles, scale, inverse_norms = ctx.saved_tensors
        grad, grad_scale = kernels.backward(grads, mixed, angles, scale, ctx.factor, inverse_norms)
        return grad, None, None, None, grad_scale, None


def split_heads(
    mixed_SBM: Tensor, heads: int, groups: int, angles: Tensor | None = None, scale: Tensor | None = None, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """q <- (scale * factor)^2 * l2_normalize(rotate(q)), k <- l2_normalize(rotate(k)), v <- v, computed in fp32 and rounded once.

    Args:
        mixed_SBM: [S, B, M] of any floating dtype, M = G * (H / G + 2) * K: for each group its queries, its key and its value.
        heads: H, query heads of this rank, a multiple of groups.
        groups: G, key and value heads of this rank.
        angles: [S, 1, 1, R] fp32, Megatron's: those of the first R/2 entries of a head, twice. Entries i and i + R/2 turn together, and
            those from R <= K on do not. None: nothing is rotated.
        scale: [H * K] fp32 (fp64 for fp64), sqk; it is squared. None: nothing is normalised, the control.
        factor: what the stored scale is multiplied by, see `ScaledParameter`.

    Returns:
        q [S, B, H, K], k and v [S, B, G, K], each contiguous, in the dtype of mixed.

    Raises:
        ValueError: the angles are for another number of positions than mixed has.

    Parallelism: none is communicated; tensor-parallel ranks hold whole groups, context-parallel ranks the angles of their tokens.

    Source: MODEL.md "Attention"; arXiv 2104.09864 (rotary positions). Kept for the backward pass: mixed and an fp32 number a head with a
        scale, the angles alone without.
    """
    if angles is not None and angles.size(0) != mixed_SBM.size(0):
        raise ValueError(f"angles: {angles.size(0)} positions, and mixed has {mixed_SBM.size(0)}")
    return _SplitHeads.apply(mixed_SBM, heads, groups, angles, scale, factor)
