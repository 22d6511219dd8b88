"""The formulas in plain torch: the path of a CPU and of fp64; the kernels are compared with it."""

import torch
from torch import Tensor

from ngpt.kernels.normalize.eager import inverse_norm_of, project_out, widened


def forward(
    mixed: Tensor, heads: int, groups: int, angles: Tensor | None, scale: Tensor | None, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As the package says."""
    q, k, v = (part.contiguous() for part in _split(widened(mixed), heads, groups))
    q, k, inverse_norms = _turn(q, angles), _turn(k, angles), None
    if scale is not None:
        inverse_norms = inverse_norm_of(torch.cat((q, k), 2), -1)
        inverse_q, inverse_k = inverse_norms.split((heads, groups), 2)
        q, k = q * inverse_q * _effective(scale, factor, q), k * inverse_k
    return q.to(mixed.dtype), k.to(mixed.dtype), v.to(mixed.dtype), inverse_norms


def backward(
    grads: tuple[Tensor, Tensor, Tensor],
    mixed: Tensor | None,
    angles: Tensor | None,
    scale: Tensor | None,
    factor: float,
    inverse_norms: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """As the package says."""
    dtype, grad_scale = grads[0].dtype, None
    grad_q, grad_k, grad_v = (widened(grad).contiguous() for grad in grads)  # the order of sums does not depend on strides
    heads, groups = grad_q.size(2), grad_k.size(2)
    if mixed is not None and scale is not None and inverse_norms is not None:
        inverse_q, inverse_k = inverse_norms.split((heads, groups), 2)
        q, k, _ = _split(widened(mixed), heads, groups)
        unit_q, unit_k = _turn(q * inverse_q, angles), _turn(k * inverse_k, angles)
        grad_scale = (grad_q * unit_q).sum((0, 1)).flatten() * (2 * factor * factor * scale)
        grad_q = project_out(grad_q * _effective(scale, factor, grad_q), unit_q, inverse_q, -1)
        grad_k = project_out(grad_k, unit_k, inverse_k, -1)
    grad_q, grad_k = _turn(grad_q, angles, back=True), _turn(grad_k, angles, back=True)
    in_groups = grad_q.unflatten(2, (groups, heads // groups))
    grad = torch.cat((in_groups, grad_k.unsqueeze(3), grad_v.unsqueeze(3)), 3)
    return grad.flatten(2).to(dtype), grad_scale


def _split(mixed: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each group's queries, its key and its value lie one after the other."""
    each = heads // groups
    in_groups = mixed.unflatten(-1, (groups, each + 2, -1))
    return in_groups[..., :each, :].flatten(2, 3), in_groups[..., each, :], in_groups[..., each + 1, :]


def _turn(x: Tensor, angles: Tensor | None, back: bool = False) -> Tensor:
    """Entries i and i + R/2 of a head turn together by angle i, of R/2; those from R on stay."""
    if angles is None:
        return x
    half = angles.size(-1) // 2
    angles = angles[..., :half].to(x.dtype)
    cos, sin = angles.cos(), -angles.sin() if back else angles.sin()
    first, second, rest = x.split((half, half, x.size(-1) - 2 * half), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def _effective(scale: Tensor, factor: float, like: Tensor) -> Tensor:
    return (scale * factor).square().view(like.shape[2:])
