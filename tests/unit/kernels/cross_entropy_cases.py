"""What the cross entropy is tested with, in plain torch, in the interpreter and on a GPU: its definition, inputs, and errors."""

import torch
from row_cases import error, kernels_for, problems
from torch import Tensor

from ngpt.functional import scaled_cross_entropy

FACTOR = -1.7  # of the stored scale


def make_inputs(tokens: int, vocabulary: int, columns: int, dtype: torch.dtype, generator: torch.Generator, size: float = 3.0) -> dict:
    """Logits, a scale around 1 of both signs, targets among the columns that count, and the gradient of each loss.

    Every third loss is masked: its gradient is 0, and its target any number.
    """
    device = generator.device
    scale = torch.randn(vocabulary, generator=generator, device=device)
    grad = torch.randn(tokens, generator=generator, device=device)
    grad[::3] = 0
    targets = torch.randint(columns, (tokens,), generator=generator, device=device)
    targets[::3] = torch.tensor([-100, columns, vocabulary, vocabulary + 5], device=device).repeat(tokens)[: len(targets[::3])]
    return dict(
        logits=(size * torch.randn(tokens, vocabulary, generator=generator, device=device)).to(dtype),
        scale=scale.sign() * (1 + scale.abs()) / 2,
        targets=targets,
        grad=grad,
        columns=columns,
    )


def truth(logits: Tensor, scale: Tensor | None, targets: Tensor, grad: Tensor, columns: int) -> list[Tensor]:
    """Losses, and gradients of the logits and of the scale, by fp64 autograd of the definition."""
    x = logits.double().requires_grad_()
    s = torch.ones(logits.size(1), dtype=torch.float64, device=x.device) if scale is None else scale.double()
    s.requires_grad_()
    factor = 1.0 if scale is None else FACTOR
    logits = (x * s * factor)[:, :columns]
    here = (targets >= 0) & (targets < columns)
    picked = logits.gather(1, targets.where(here, 0)[:, None])[:, 0].where(here, 0)  # of a target that is none: nothing
    losses = logits.logsumexp(-1) - picked
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


def assert_broken_logits_show(device: str, generator: torch.Generator) -> None:
    """A logit that is NaN or +inf makes its token's loss NaN or infinite; -inf has no probability; no other token sees it."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        inputs = make_inputs(6, 70, 65, torch.float32, generator) | {"scale": None}
        inputs["targets"][3], inputs["logits"][3, 40] = 41, bad
        with kernels_for(device):
            losses, grad = ours(**inputs)
        assert losses.isfinite().tolist() == [True] * 3 + [bad == -torch.inf] + [True] * 2
        assert grad[:3].isfinite().all() and grad[4:].isfinite().all()
        if bad == -torch.inf:
            assert error(losses, truth(**inputs)[0]) < 1e-6 and grad[3, 40] == 0


def assert_padding_takes_no_part(device: str, generator: torch.Generator) -> None:
    """Whatever the padding holds, even NaN; its gradient is zero."""
    inputs = make_inputs(5, 70, 65, torch.float32, generator)
    with kernels_for(device):
        expected = ours(**inputs)
        inputs["logits"][:, 65:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 0])
        losses, grad, grad_scale = ours(**inputs)
    assert torch.equal(losses, expected[0]) and torch.equal(grad, expected[1]) and not grad[:, 65:].any()
    assert torch.equal(grad_scale[:65], expected[2][:65]) and not grad_scale[65:].nan_to_num(1.0).any()
