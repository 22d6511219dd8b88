"""Cross entropy of logits with nGPT's trained scale, over a vocabulary that ranks may share."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ngpt.kernels import cross_entropy as kernels


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, scale, factor, targets, columns, scale_of_grad, group) -> Tensor:
        rows, targets = logits.flatten(0, -2), targets.flatten()
        largest, total, picked = kernels.forward(rows, scale, factor, targets, columns)
        if group is not None and group.size() > 1:
            own = largest.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            sums = torch.stack((total * (own - largest).exp2(), picked))
            dist.all_reduce(sums, group=group)
            total, picked = sums
        ctx.save_for_backward(logits, scale, targets, largest, total, scale_of_grad)
        ctx.factor, ctx.columns, ctx.is_spent = factor, columns, False
        return (largest - picked).add_(total.log2()).mul_(math.log(2)).view(logits.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.is_spent:
            raise RuntimeError("The gradient of scaled_cross_entropy's logits took their place: run the forward pass again.")
        ctx.is_spent = True
        logits, scale, targets, *over_all_ranks, scale_of_grad = ctx.saved_tensors
        rows, grad = logits.flatten(0, -2), grad.flatten()
        grad_rows, grad_scale = kernels.backward_(grad, rows, scale, ctx.factor, targets, ctx.columns, *over_all_ranks, scale_of_grad)
        torch.autograd.graph.increment_version(logits)  # so that whoever else saved the logits gets an error
        return grad_rows.view(logits.shape), grad_scale, None, None, None, None, None


def scaled_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor | None = None,
    factor: float = 1.0,
    *,
    columns: int | None = None,
    scale_of_grad: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """-log softmax(logits * (scale * factor))[target] of each token, computed in fp32 without rounding in between.

    The backward pass overwrites the logits with their gradient, so nobody may use them afterwards.

    Args:
        logits: [..., V] of any floating dtype, before the scale; this rank's part of the vocabulary.
        targets: [...] int64, counted from this rank's first entry; others belong to other ranks of the group.
        scale: [V] fp32 (fp64 for fp64), sz; None: 1, the control.
        factor: what the stored scale is multiplied by, see `ScaledParameter`.
        columns: entries of V that count; the rest only pad the vocabulary, with neither probability nor gradient. None: all.
        scale_of_grad: [V] fp32 (fp64 for fp64) that the gradient of the scaled logits is multiplied with on its way to `logits`, in place
            of scale * factor; the scale's own gradient does not change.
        group: ranks that share the vocabulary.

    Returns:
        [...] fp32 (fp64 for fp64), in nats.

    Parallelism: two all-reduces over the group forward, of one and of two numbers a token; none backward.

    Source: MODEL.md "Logits"; with z = s x, p = softmax(z) and dL the gradient of the loss: dL/dz = (p - onehot) dL, dL/dx = s dL/dz,
    dL/ds = the sum of x dL/dz over the tokens.
    """
    columns = logits.size(-1) if columns is None else columns
    return _CrossEntropy.apply(logits, scale, factor, targets, columns, scale_of_grad, group)
