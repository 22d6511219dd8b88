"""The formulas in plain torch: the path of a CPU and of fp64; the kernels are compared with it."""

import torch
from torch import Tensor

from ngpt.kernels.activation.form import Form
from ngpt.kernels.activation.functions import FUNCTIONS
from ngpt.kernels.normalize import eager as normalize


def forward(u: Tensor, scale: Tensor, factor: float, form: Form, sizes: list[int] | None) -> tuple[Tensor, Tensor | None, list[int] | None]:
    """As the package says."""
    value, _, up = _value_slope_up(u, scale, factor, form, sizes)
    y = value * up if form.gated else value
    inverse_norm = None
    if form.normalize:
        inverse_norm = normalize.inverse_norm_of(y, -1, form.group)
        y = y * inverse_norm
    return y.to(u.dtype), inverse_norm, sizes


def backward(
    grad: Tensor, u: Tensor, scale: Tensor, factor: float, form: Form, inverse_norm: Tensor | None, sizes: list[int] | None
) -> tuple[Tensor, Tensor]:
    """As the package says."""
    value, slope, up = _value_slope_up(u, scale, factor, form, sizes)
    grad = normalize.widened(grad)
    if inverse_norm is not None:
        y = value * up if form.gated else value
        grad = normalize.project_out(grad, y * inverse_norm, inverse_norm, -1, form.group)
    grad_v = torch.cat((grad * up * slope, grad * value), -1) if form.gated else grad * slope
    grad_u = grad_v * _of_rows(scale, factor, sizes, u)
    by_row = (grad_v * u).flatten(0, -2)
    if sizes is None:
        grad_scale = by_row.sum(0)
    else:
        grad_scale = torch.stack([rows.sum(0) for rows in by_row.split(sizes)])
    return grad_u.to(u.dtype), grad_scale.mul_(factor).to(scale.dtype)


def _value_slope_up(u: Tensor, scale: Tensor, factor: float, form: Form, sizes: list[int] | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """f and its derivative where f is applied, and the other half of a gated row."""
    v = normalize.widened(u) * _of_rows(scale, factor, sizes, u)
    gate, up = v.chunk(2, -1) if form.gated else (v, None)
    return *FUNCTIONS[form.function](gate), up


def _of_rows(scale: Tensor, factor: float, sizes: list[int] | None, u: Tensor) -> Tensor:
    """The effective scale of every row, or of all."""
    scale = scale * factor
    if sizes is None:
        return scale
    return torch.repeat_interleave(scale, torch.tensor(sizes, device=u.device), dim=0, output_size=u.size(0))
