"""Experts' tokens are filled up to whole blocks of the low-precision formats, which changes no bit of what they compute."""

import pytest
import torch
from torch import Tensor, nn

from megatron_ext.layers import experts
from megatron_ext.layers.backend import with_mixin
from megatron_ext.precision.executors import Quantizable
from megatron_ext.precision.linear import LinearCall, emulated_linear
from ngpt.config import compose
from ngpt.config.recipes import recipe_of

RECIPES = {
    "paper": ["precision=nvfp4_paper"],
    "static": ["precision=nvfp4_static"],
    "nvidia": ["precision=nvfp4_nvidia"],  # amaxes of whole tensors, and the Hadamard transform along tokens
}
IN, OUT = 32, 48


class Plain(nn.Module):
    """A backend's linear."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(nn.functional.normalize(torch.randn(OUT, IN, generator=generator), dim=-1))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x @ self.weight.t(), None


class Linear(Quantizable, Plain):
    """One that is quantised; `seen` has the tokens of each call."""

    def __init__(self, recipe):
        super().__init__()
        self.recipe, self.executor, self.seen = recipe, self.execute, []

    def execute(self, linear: nn.Module, x: Tensor) -> tuple[Tensor, None]:
        self.seen.append(x.size(0))
        return emulated_linear(x, self.weight, LinearCall(recipe=self.recipe, rounding_seed=lambda: 3)), None


def run(linear: nn.Module, tokens: int) -> list[Tensor]:
    """Output and gradients of input and weight."""
    generator = torch.Generator().manual_seed(1)
    x = nn.functional.normalize(torch.randn(tokens, IN, generator=generator), dim=-1).requires_grad_()
    y, _ = linear(x)
    y.backward(0.1 * torch.randn(tokens, OUT, generator=generator))
    return [y.detach(), x.grad, linear.weight.grad]


def recipe(name: str):
    return recipe_of(compose(["experiment=ngpt_hybrid_tiny", *RECIPES[name], "precision.stochastic_rounding=false"]).precision)


@pytest.mark.parametrize("name", RECIPES)
def test_more_padding_changes_no_bit(name, monkeypatch):
    padded = with_mixin(experts.PadsTokens, Linear)
    results = {}
    for multiple in (32, 64, 128):
        monkeypatch.setattr(experts, "TOKEN_MULTIPLE", multiple)
        linear = padded(recipe(name))
        results[multiple] = run(linear, 19)
        assert linear.seen == [multiple]
    for multiple in (64, 128):
        assert all(torch.equal(a, b) for a, b in zip(results[multiple], results[32], strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_padding_changes_no_bit_of_what_fits_without(name):
    with_padding, without = run(with_mixin(experts.PadsTokens, Linear)(recipe(name)), 16), run(Linear(recipe(name)), 16)
    assert all(torch.equal(a, b) for a, b in zip(with_padding, without, strict=True))


def test_an_expert_without_tokens_has_zero_gradients():
    linear = with_mixin(experts.PadsTokens, Linear)(recipe("paper"))
    y, grad_x, grad_weight = run(linear, 0)
    assert y.shape == (0, OUT) and grad_x.shape == (0, IN) and linear.seen == []
    assert grad_weight.eq(0).all()


def test_high_precision_is_not_padded():
    linear = with_mixin(experts.PadsTokens, Linear)(recipe("paper"))
    linear.executor = None
    x = torch.randn(5, IN, generator=torch.Generator().manual_seed(2))
    assert torch.equal(linear(x)[0], x @ linear.weight.t())
