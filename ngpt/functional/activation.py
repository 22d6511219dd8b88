"""The activation of an MLP of nGPT, between its scale and the norm of its output."""

import torch
import torch.distributed as dist
from torch import Tensor

from ngpt.kernels import activation as kernels
from ngpt.kernels.activation import Form


class _ScaledActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, scale: Tensor, factor: float, form: Form, sizes: list[int] | None) -> Tensor:
        y, inverse_norm, ctx.groups = kernels.forward(u, scale, factor, form, sizes)
        ctx.save_for_backward(u, scale, inverse_norm)
        ctx.factor, ctx.form = factor, form
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        u, scale, inverse_norm = ctx.saved_tensors
        return *kernels.backward(grad, u, scale, ctx.factor, ctx.form, inverse_norm, ctx.groups), None, None, None


def scaled_activation(
    u: Tensor,
    scale: Tensor,
    factor: float = 1.0,
    *,
    function: str,
    gated: bool,
    normalize: bool = False,
    group: dist.ProcessGroup | None = None,
    sizes: list[int] | None = None,
) -> Tensor:
    """f(scale * factor * u), or f(gate) * up of its two halves, with or without unit norm; rounded to u's dtype once.

    Args:
        u: [..., F], or [..., 2 F] gated, any floating dtype. The backward pass keeps this, and one number a row if normalised.
        scale: fp32 (fp64 for fp64), as many entries as u has features. With sizes: one such row for each group.
        factor: what the stored scale is multiplied by, see `ScaledParameter`.
        function: f, by its name in `ngpt.kernels.activation.functions`.
        gated: the first half of v is the gate; the second half is multiplied by f(gate).
        normalize: the output gets unit norm along its features, as `l2_normalize` gives.
        group: process group over which the features are sharded, each half of gated ones. Where normalised, the sums of squares
            (forward) and the radial part of the gradient (backward) are all-reduced over it.
        sizes: u is [T, features], and its rows form consecutive groups of these sizes, each with its own scale; sizes may be 0.

    Returns:
        [..., F] in u's dtype. All arithmetic is fp32 (fp64 for fp64).

    Raises:
        ValueError: the sizes are not those of u and of the scale.

    Source: MODEL.md "MLP", "MoE" and "Fine-grained".
    """
    return _ScaledActivation.apply(u, scale, factor, Form(function, gated, normalize, group), sizes)
