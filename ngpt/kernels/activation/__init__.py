"""The activation of an MLP with the trained scale in front of it and the norm behind it: each pass reads its inputs once, or twice where
ranks share the features of a row.

CUDA tensors go through Triton kernels, all others (including fp64, norms of rows wider than `MAX_WIDTH`) through plain torch. Both
compute in fp32 and round once; `ngpt.functional.activation` has the mathematics and the autograd function.
"""

from torch import Tensor

from ngpt.kernels.activation import eager
from ngpt.kernels.activation.form import Form
from ngpt.kernels.rows import MAX_WIDTH, kernels_take

__all__ = ["Form", "backward", "forward"]


def forward(u: Tensor, scale: Tensor, factor: float, form: Form, sizes: list[int] | None) -> tuple[Tensor, Tensor | None, object]:
    """y in u's dtype; the inverse norms where normalised; and what the backward pass needs to know about the sizes.

    Args:
        u: [..., F], or [..., 2 F] gated.
        scale: [features of u]; with sizes [groups, features of u].
        sizes: rows of u [T, ...] in each group, one after the other; None: one scale for all.
    """
    return _backend(u, scale, form, sizes is not None).forward(u, scale, factor, form, sizes)


def backward(
    grad: Tensor, u: Tensor, scale: Tensor, factor: float, form: Form, inverse_norm: Tensor | None, groups: object
) -> tuple[Tensor, Tensor]:
    """Gradients of u and of the scale; `inverse_norm` and `groups` from the forward pass."""
    return _backend(u, scale, form, groups is not None).backward(grad, u, scale, factor, form, inverse_norm, groups)


def _backend(u: Tensor, scale: Tensor, form: Form, grouped: bool):
    fits = scale.shape[1 if grouped else 0 :] == u.shape[-1:]
    fits = fits and not (form.normalize and u.size(-1) > (2 if form.gated else 1) * MAX_WIDTH)
    if not (fits and kernels_take(u, fp32=(scale,))):
        return eager
    from ngpt.kernels.activation import triton  # here, since triton may be missing where there is no CUDA

    return triton
