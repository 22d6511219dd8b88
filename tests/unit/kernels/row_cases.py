"""What the row-wise kernels are tested with, in the interpreter and on a GPU: their definitions, inputs, and errors against fp64."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from reference_activations import ACTIVATIONS as REFERENCES
from torch import Tensor

from ngpt.config.activations import ACTIVATIONS as FUNCTIONS
from ngpt.functional import (
    l2_normalize,
    lerp_retract,
    scale_features,
    scale_tokens,
    scaled_activation,
)
from ngpt.kernels import rows

ROWS = {"ordinary": 1.0, "zero": 0.0, "tiny": 1e-20, "near_eps": 1e-6, "huge": 1e18}  # typical size of an entry


FACTOR = -1.7  # of stored scales; the signs of alpha and of the factor both matter


def plain_l2(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-12)


def plain_lerp(h: Tensor, b: Tensor, alpha: Tensor) -> Tensor:
    g = plain_l2(h)
    return plain_l2(g + (FACTOR * alpha).abs() * (plain_l2(b) - g))


def activation(name: str, normalized: bool) -> tuple[Callable, Callable]:
    """The kernels' function and its definition; with `sizes` each group of rows has a scale of its own."""

    reference = REFERENCES[name]
    form = dict(function=FUNCTIONS[name].function, gated=reference.gated, normalize=normalized)

    def ours(u: Tensor, scale: Tensor, sizes: list[int] | None = None) -> Tensor:
        return scaled_activation(u, scale, FACTOR, **form, sizes=sizes)

    def plain(u: Tensor, scale: Tensor, sizes: list[int] | None = None) -> Tensor:
        if sizes is not None:
            scale = torch.repeat_interleave(scale, torch.tensor(sizes, device=u.device), dim=0)
        v = u * scale * FACTOR
        gate, up = v.chunk(2, -1) if reference.gated else (v, 1)
        y = reference.f(gate) * up
        return plain_l2(y) if normalized else y

    return ours, plain


OPERATIONS: dict[str, tuple[Callable, Callable]] = {
    "l2_normalize": (l2_normalize, plain_l2),
    "lerp_retract": (lambda h, b, alpha: lerp_retract(h, b, alpha, FACTOR), plain_lerp),
    "scale_features": (lambda x, scale: scale_features(x, scale, FACTOR), lambda x, scale: x * scale * FACTOR),
    "scale_tokens": (scale_tokens, lambda x, scale: x * scale[:, None]),
}
# Operation: activation. Without a norm one of each kind stands for all, which have the same kernel around another function.
ACTIVATIONS = {name: name for name in ("squared_relu", "swiglu")} | {f"normalized {name}": name for name in REFERENCES}
OPERATIONS |= {operation: activation(name, operation != name) for operation, name in ACTIVATIONS.items()}


@contextmanager
def kernels_for(*devices: str):
    """The kernels for tensors of these kinds of devices only."""
    before = set(rows.DEVICES)
    rows.DEVICES.clear()
    rows.DEVICES.update(devices)
    try:
        yield
    finally:
        rows.DEVICES.clear()
        rows.DEVICES.update(before)


def make_inputs(operation: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, groups: int = 0) -> list[Tensor]:
    """Activations of the dtype, then the fp32 parameter: of both signs, around 0.05 for alpha and around 1 for scales.

    Args:
        shape: of the result.
        groups: of rows that have a parameter of their own each; 0: one for all.
    """
    device = generator.device
    if operation in ACTIVATIONS and REFERENCES[ACTIVATIONS[operation]].gated:
        shape = (*shape[:-1], 2 * shape[-1])

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    parameter_shape = {
        "l2_normalize": None,
        "scale_tokens": shape[:1],
    }.get(operation, shape[-1:])
    if groups:
        parameter_shape = (groups, shape[-1])
    activations = [random(*shape).to(dtype) for _ in range(2 if operation == "lerp_retract" else 1)]
    if parameter_shape is None:
        return activations
    size = 0.05 if operation == "lerp_retract" else 1.0
    parameter = random(*parameter_shape)
    return [*activations, (parameter.sign() * (1 + parameter.abs()) * size / 2)]


def value_and_gradients(function: Callable, inputs: list[Tensor], grad: Tensor, *rest: list[int]) -> list[Tensor]:
    """Inputs keep their strides."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, *rest)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest true entry."""
    if not truth.numel():
        return 0.0
    return ((actual.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-300)).item()


def problems(names: list[str], actual: list[Tensor], eager: list[Tensor], truth: list[Tensor]) -> list[str]:
    """What is not finite, or off by more than twice the error of plain torch in the same dtype, plus 1e-5."""
    found = []
    for name, a, e, t in zip(names, actual, eager, truth, strict=True):
        if a.dtype != e.dtype or a.shape != e.shape:
            found.append(f"{name}: {a.dtype} {tuple(a.shape)} instead of {e.dtype} {tuple(e.shape)}")
        elif not a.isfinite().all():
            found.append(f"{name}: not finite")
        elif not error(a, t) <= 2 * error(e, t) + 1e-5:
            found.append(f"{name}: error {error(a, t):.2e}, eager {error(e, t):.2e}")
    return found


def check(operation: str, inputs: list[Tensor], grad: Tensor, *rest: list[int]) -> list[str]:
    """Problems of the kernels' value and gradients, against fp64 autograd of the definition and against the eager backend."""
    function, plain = OPERATIONS[operation]
    with kernels_for(inputs[0].device.type):
        actual = value_and_gradients(function, inputs, grad, *rest)
    with kernels_for():
        eager = value_and_gradients(function, inputs, grad, *rest)
    truth = value_and_gradients(plain, [x.double() for x in inputs], grad.double(), *rest)
    return problems(["value", *(f"gradient {i}" for i in range(len(inputs)))], actual, eager, truth)
