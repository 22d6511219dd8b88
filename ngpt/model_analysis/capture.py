"""Inputs and output gradients of block linears, one layer at a time.

One forward pass keeps only the stream before each layer. Then each layer, the last one first, runs forward with gradients and backward, as
in activation recomputation. So memory holds one layer's activations, and the logits of a few tokens. Weights get no gradients.

Shapes: B batch, S tokens, D hidden, M = B * S tokens of a linear, or the tokens that an expert gets; x_MK, dy_MN.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ngpt.hf.modeling_ngpt import NGPTForCausalLM
from ngpt.model_analysis.linears import Linear, Project, projected_by

LOGITS_AT_ONCE = 1024  # tokens


@dataclass
class Call:
    """What one linear, or one expert, has multiplied in a pass.

    Attributes:
        outputs: the projections' outputs by index, since the model may call them in another order.
    """

    linear: Linear
    expert: int | None
    x_MK: Tensor
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def grad_output(self) -> Tensor:
        """dy [M, N]: the gradient of the sum of the tokens' losses, as training also passes through its layers."""
        columns = [torch.zeros_like(output) if output.grad is None else output.grad for _, output in sorted(self.outputs.items())]
        return self.linear.join([grad.flatten(0, -2).t() for grad in columns]).t().contiguous()

    def weight(self) -> Tensor:
        weight = self.linear.weight()
        return weight if self.expert is None else weight[self.expert]


def captured(model: NGPTForCausalLM, linears: Sequence[Linear], ids_BS: Tensor) -> Iterator[list[Call]]:
    """The calls of each layer with any of these linears, the last layer first. A layer's calls are cleared when the next is requested.

    Args:
        ids_BS: [B, S + 1]; the last token is only predicted.
    """
    of_layer = {layer: list(found) for layer, found in groupby(linears, key=lambda linear: linear.layer)}
    with _without_gradients(model):
        inputs, h_BSD = _streams(model, ids_BS[:, :-1])
        grad_BSD = _loss_gradient(model, h_BSD, ids_BS[:, 1:])
        for number in reversed(range(len(inputs))):
            if number < min(of_layer, default=0):
                return
            layer, (h_BSD, options) = model.model.layers[number], inputs.pop()
            h_BSD = h_BSD.detach().requires_grad_()
            with torch.enable_grad(), _recorded(of_layer.get(number, [])) as calls:
                layer(h_BSD, **options).backward(grad_BSD)
            grad_BSD = h_BSD.grad
            if calls:
                yield calls


@contextmanager
def _without_gradients(model: NGPTForCausalLM) -> Iterator[None]:
    """Turns off gradients of parameters inside the context, and restores each parameter's setting afterwards."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_()


@torch.no_grad()
def _streams(model: NGPTForCausalLM, ids_BS: Tensor) -> tuple[list[tuple[Tensor, dict]], Tensor]:
    """(h, further arguments) of each layer, and the stream after the last one."""
    inputs: list[tuple[Tensor, dict]] = []
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for layer in model.model.layers:
            before = layer.register_forward_pre_hook(lambda _, given, options: inputs.append((given[0], options)), with_kwargs=True)
            stack.callback(before.remove)
        stack.callback(model.model.layers[-1].register_forward_hook(lambda _, given, output: outputs.append(output)).remove)
        model.model(ids_BS, use_cache=False)
    return inputs, outputs[0]


def _loss_gradient(model: NGPTForCausalLM, h_BSD: Tensor, targets_BS: Tensor) -> Tensor:
    """Gradient of the sum of the tokens' cross entropies with respect to the stream after the last layer."""
    h_TD, targets_T = h_BSD.flatten(0, 1), targets_BS.flatten()
    grad_TD = torch.empty_like(h_TD)
    for first in range(0, len(h_TD), LOGITS_AT_ONCE):
        part = slice(first, first + LOGITS_AT_ONCE)
        chunk = h_TD[part].detach().requires_grad_()
        with torch.enable_grad():
            stream = chunk if model.config.is_ngpt else model.model.norm_f(chunk)
            F.cross_entropy(model.logits(stream), targets_T[part], reduction="sum").backward()
        grad_TD[part] = chunk.grad
    return grad_TD.view_as(h_BSD)


@contextmanager
def _recorded(linears: Sequence[Linear]) -> Iterator[list[Call]]:
    """Collects the calls of these linears inside the context, in order. Their outputs keep gradients."""
    calls: dict[tuple[str, int | None], Call] = {}

    def note(linear: Linear, expert: int | None, place: int, x: Tensor, output: Tensor) -> None:
        if output.requires_grad:  # otherwise the loss does not depend on it
            output.retain_grad()
        calls.setdefault((linear.name, expert), Call(linear, expert, x.detach().flatten(0, -2))).outputs[place] = output

    def project(linear: Linear, expert: int, x: Tensor, own: Project) -> Tensor:
        output = own(x)
        note(linear, expert, 0, x, output)
        return output

    found: list[Call] = []
    with ExitStack() as stack:
        for linear in linears:
            for place, projection in enumerate(linear.projections):
                take = partial(note, linear, None, place)
                hook = projection.register_forward_hook(lambda _, given, output, take=take: take(given[0], output))
                stack.callback(hook.remove)
        stack.enter_context(projected_by(linears, project))
        yield found
        found.extend(calls.values())
