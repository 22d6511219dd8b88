"""What the pass from mixed heads to queries, keys and values is tested with: its definition, inputs, and errors against fp64."""

from dataclasses import dataclass, replace

import torch
from row_cases import kernels_for, plain_l2, problems
from torch import Tensor

from ngpt.functional import split_heads

FACTOR = -1.7  # of the stored scale


@dataclass(frozen=True)
class Case:
    """rotated: entries of a head that turn, 0: none. is_scaled: normalised and scaled, as in nGPT."""

    heads: int
    groups: int
    width: int
    rotated: int
    is_scaled: bool = True
    sequence: int = 3
    batch: int = 2


@dataclass(frozen=True)
class Inputs:
    mixed: Tensor
    angles: Tensor | None
    scale: Tensor | None
    grads: tuple[Tensor, Tensor, Tensor]
    heads: int
    groups: int

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Activations and gradients in another dtype, and the scale in the one that goes with it."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale = None if self.scale is None else self.scale.to(wide)
        return replace(self, mixed=self.mixed.to(dtype), scale=scale, grads=tuple(grad.to(dtype) for grad in self.grads))


def make_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Positions are far apart, so that angles reach those of long sequences; the scale has both signs."""
    device = generator.device

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    lead, angles, scale = (case.sequence, case.batch), None, None
    if case.rotated:
        position = torch.linspace(0, 8191, case.sequence, device=device).round()
        angles = position[:, None] * 10000 ** -torch.linspace(0, 1, case.rotated // 2, device=device)
        angles = torch.cat((angles, angles), -1)[:, None, None, :]
    if case.is_scaled:
        scale = random(case.heads * case.width)
        scale = scale.sign() * (1 + scale.abs()) / 2
    return Inputs(
        mixed=random(*lead, (case.heads + 2 * case.groups) * case.width).to(dtype),
        angles=angles,
        scale=scale,
        grads=tuple(random(*lead, heads, case.width).to(dtype) for heads in (case.heads, case.groups, case.groups)),
        heads=case.heads,
        groups=case.groups,
    )


def truth(inputs: Inputs) -> list[Tensor]:
    """Queries, keys, values, the gradient of mixed, and of the scale where there is one: fp64 autograd of the definition, as complex
    numbers, head by head."""
    inputs = inputs.to(torch.float64)
    mixed = inputs.mixed.detach().requires_grad_()
    scale = None if inputs.scale is None else inputs.scale.detach().requires_grad_()
    each, width = inputs.heads // inputs.groups, mixed.size(-1) // (inputs.heads + 2 * inputs.groups)
    parts = list(mixed.split(width, -1))

    def turned(x: Tensor) -> Tensor:
        if inputs.angles is None:
            return x
        half = inputs.angles.size(-1) // 2
        angle = inputs.angles[:, :, 0, :half].double()
        pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(angle.cos(), angle.sin())
        return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :]), -1)

    queries, keys, values = [], [], []
    for number, part in enumerate(parts):
        kind = number % (each + 2)
        (queries if kind < each else keys if kind == each else values).append(part if kind > each else turned(part))
    if scale is not None:
        factors = (scale * FACTOR).square().split(width)
        queries, keys = [plain_l2(q) * factor for q, factor in zip(queries, factors, strict=True)], [plain_l2(k) for k in keys]
    out = [torch.stack(part, 2) for part in (queries, keys, values)]
    parameters = [mixed] if scale is None else [mixed, scale]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, parameters, inputs.grads)]


def ours(inputs: Inputs) -> list[Tensor]:
    """The same by `split_heads`; inputs and gradients keep their strides."""
    mixed = inputs.mixed.detach().requires_grad_()
    scale = None if inputs.scale is None else inputs.scale.detach().requires_grad_()
    out = split_heads(mixed, inputs.heads, inputs.groups, inputs.angles, scale, FACTOR)
    parameters = [mixed] if scale is None else [mixed, scale]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, parameters, inputs.grads)]


NAMES = ["queries", "keys", "values", "gradient of mixed", "gradient of the scale"]


def check(inputs: Inputs) -> list[str]:
    """Problems of the kernels against fp64, and against plain torch in the same dtype."""
    with kernels_for(inputs.mixed.device.type):
        actual = ours(inputs)
    with kernels_for():
        eager = ours(inputs)
    found = problems(NAMES[: len(actual)], actual, eager, truth(inputs))
    return found + [f"{name}: not contiguous" for name, x in zip(NAMES[:3], actual, strict=False) if not x.is_contiguous()]


def strided(inputs: Inputs) -> list[Inputs]:
    """The gradients as attention may give them: batch outside, all of a token in one tensor, columns apart, and one number."""
    q, k, v = inputs.grads
    heads, groups = inputs.heads, inputs.groups
    together = torch.cat((q, k, v), 2)
    return [
        replace(inputs, grads=tuple(grad.transpose(0, 1).contiguous().transpose(0, 1) for grad in (q, k, v))),
        replace(inputs, grads=together.split((heads, groups, groups), 2)),
        replace(inputs, grads=tuple(grad.transpose(2, 3).contiguous().transpose(2, 3) for grad in (q, k, v))),
        replace(inputs, grads=tuple(torch.ones_like(grad[:1, :1, :1, :1]).expand_as(grad) for grad in (q, k, v))),
    ]


def with_heads_of_size(inputs: Inputs, size: float) -> Inputs:
    """Every third head of every token as small or large as that."""
    mixed = inputs.mixed.clone().unflatten(-1, (inputs.heads + 2 * inputs.groups, -1))
    mixed[:, :, ::3] *= size
    return replace(inputs, mixed=mixed.flatten(2))
