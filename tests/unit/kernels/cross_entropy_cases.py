"""What the cross entropy is tested with, in plain torch, in the interpreter and on a GPU: its definition, inputs, and errors."""

import torch
from row_cases import kernels_for, problems
from torch import Tensor

from ngpt.functional import scaled_cross_entropy

FACTOR = -1.7  # of the stored scale


def make_inputs(tokens: int, vocabulary: int, columns: int, dtype: torch.dtype, generator: torch.Generator, size: float = 3.0) -> dict:
    """Logits, a scale around 1 of both signs, targets among the columns that count, and the gradient of each loss; some are 0."""
    device = generator.device
    scale = torch.randn(vocabulary, generator=generator, device=device)
    grad = torch.randn(tokens, generator=generator, device=device)
    grad[::3] = 0
    return dict(
        logits=(size * torch.randn(tokens, vocabulary, generator=generator, device=device)).to(dtype),
        scale=scale.sign() * (1 + scale.abs()) / 2,
        targets=torch.randint(columns, (tokens,), generator=generator, device=device),
        grad=grad,
        columns=columns,
    )


def truth(logits: Tensor, scale: Tensor | None, targets: Tensor, grad: Tensor, columns: int) -> list[Tensor]:
    """Losses, and gradients of the logits and of the scale, by fp64 autograd of the definition."""
    x = logits.double().requires_grad_()
    s = torch.ones(logits.size(1), dtype=torch.float64, device=x.device) if scale is None else scale.double()
    s.requires_grad_()
    factor = 1.0 if scale is None else FACTOR
    losses = -torch.log_softmax((x * s * factor)[:, :columns], -1).gather(1, targets[:, None])[:, 0]
    grads = torch.autograd.grad(losses, (x, s), grad.double())
    return [losses.detach(), *grads[: 1 if scale is None else 2]]


def ours(logits: Tensor, scale: Tensor | None, targets: Tensor, grad: Tensor, columns: int, **options) -> list[Tensor]:
    """The same by `scaled_cross_entropy`, on copies that keep their strides."""
    x = logits.clone().requires_grad_()
    parameters = [x] if scale is None else [x, scale.clone().requires_grad_()]
    factor = 1.0 if scale is None else FACTOR
    losses = scaled_cross_entropy(x * 1, targets, *parameters[1:], factor=factor, columns=columns, **options)
    return [losses.detach(), *torch.autograd.grad(losses, parameters, grad.to(losses.dtype))]


def check(inputs: dict) -> list[str]:
    """Problems of the kernels' losses and gradients against fp64, and against plain torch in the same dtype."""
    with kernels_for(inputs["logits"].device.type):
        actual = ours(**inputs)
    with kernels_for():
        eager = ours(**inputs)
    return problems(["losses", "gradient of the logits", "gradient of the scale"][: len(actual)], actual, eager, truth(**inputs))
