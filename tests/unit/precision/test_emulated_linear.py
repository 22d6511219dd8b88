"""The emulated linear against products of reference-quantised operands in fp64."""

import dataclasses

import pytest
import torch

from megatron_ext.precision import weights as step_weights
from megatron_ext.precision.linear import LinearCall, emulated_linear
from megatron_ext.precision.weights import StepWeights
from ngpt.config import compose
from ngpt.config.recipes import recipe_of
from ngpt.kernels.nvfp4_quantize import emulate
from ngpt.precision import quantize
from ngpt.precision.diagnostics import GemmWatch
from ngpt.recipes import FourOverSix, QuantizerSpec

SEED = 1234567
TOKENS, K, N = 64, 48, 96
RECIPES = {
    "paper": ["precision=nvfp4_paper"],
    "nvidia": ["precision=nvfp4_nvidia"],
    "static": ["precision=nvfp4_static"],
    "nearest": ["precision=nvfp4_paper", "precision.stochastic_rounding=false"],
    "static_input_dynamic_grad": ["precision=nvfp4_paper", "precision.grad_output_amax=dynamic"],
    "dynamic_input_static_weight": ["precision=nvfp4_paper", "precision.input_amax=dynamic"],
    "rows_of_weights": ["precision=nvfp4_nvidia", "precision.weight_blocks=1x16"],
    "four_over_six": ["precision=nvfp4_four_over_six"],
    "six_cells": [  # an operand, a direction: each its own way
        "precision=nvfp4_nvidia",
        "precision.operands.input_rowwise={amax: static}",
        "precision.operands.input_columnwise={amax: dynamic_pow2, rounding: stochastic, rht: none}",
        "precision.operands.weight_rowwise={four_over_six: mse, bound: 448}",
        "precision.operands.weight_columnwise={blocks: 1x16, rounding: stochastic}",
        "precision.operands.grad_output_rowwise={amax: dynamic_pow2}",
        "precision.operands.grad_output_columnwise={rounding: nearest, rht: none}",
    ],
}

FOUR_OVER_SIX = QuantizerSpec(four_over_six=FourOverSix())  # its block scales reach 256, others' 448
BY_HAND = {  # options of the quantiser that no shipped recipe has
    "four_over_six_everywhere": {"input": FOUR_OVER_SIX, "weight": FOUR_OVER_SIX, "grad_output": FOUR_OVER_SIX},
    "four_over_six_gradient": {"grad_output": FOUR_OVER_SIX},
}


def recipe(name: str):
    if name in BY_HAND:
        return dataclasses.replace(recipe("nearest"), **BY_HAND[name])
    return recipe_of(compose(["experiment=ngpt_tiny", *RECIPES[name]]).precision)


def operands(dtype=torch.float32):
    generator = torch.Generator().manual_seed(11)
    x = torch.nn.functional.normalize(torch.randn(8, 8, K, generator=generator), dim=-1).to(dtype)
    w = torch.nn.functional.normalize(torch.randn(N, K, generator=generator), dim=-1).to(dtype)
    dy = (torch.randn(8, 8, N, generator=generator) * 1e-3).to(dtype)
    return x.requires_grad_(), w.requires_grad_(), dy


def dequantized(x, spec, direction, seed=None):
    """fp64 [rows, columns] of the stored matrix, the global scale exact."""
    spec = getattr(spec, direction)
    stored = quantize(x.detach().flatten(0, -2), spec, direction, seed=seed if spec.rounding == "sr" else None)
    return stored.decode().double() * stored.decode_factor


def expected(x, w, dy, recipe):
    y = dequantized(x, recipe.input, "rowwise") @ dequantized(w, recipe.weight, "rowwise").t()
    dx = dequantized(dy, recipe.grad_output, "rowwise", SEED) @ dequantized(w, recipe.weight, "columnwise", SEED ^ 2).t()
    dw = dequantized(dy, recipe.grad_output, "columnwise", SEED) @ dequantized(x, recipe.input, "columnwise", SEED ^ 1).t()
    return y, dx, dw


def call(recipe, **options):
    return LinearCall(recipe=recipe, rounding_seed=lambda: SEED, **options)


def relative(got, wanted):
    return ((got.detach().double().flatten(0, -2) - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("name", [*RECIPES, *BY_HAND])
def test_the_three_products_are_near_those_of_what_was_not_quantised(name):
    x, w, dy = operands()
    y = emulated_linear(x, w, call(recipe(name)))
    y.backward(dy)
    x_MK, dy_MN = x.detach().double().flatten(0, -2), dy.double().flatten(0, -2)
    for got, wanted in ((y, x_MK @ w.detach().double().t()), (x.grad, dy_MN @ w.detach().double()), (w.grad, dy_MN.t() @ x_MK)):
        assert relative(got, wanted) < 0.25


@pytest.mark.parametrize("name", [*RECIPES, *BY_HAND])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)])
def test_the_three_products_take_the_quantised_operands(name, dtype, bound):
    x, w, dy = operands(dtype)
    y = emulated_linear(x, w, call(recipe(name)))
    y.backward(dy)
    for got, wanted in zip((y, x.grad, w.grad), expected(x, w, dy, recipe(name)), strict=True):
        assert got.dtype == dtype
        assert relative(got, wanted) < bound


def test_the_weight_gradient_is_added_to_megatrons_buffer_in_fp32():
    for name in ("paper", "nvidia"):
        x, w, dy = operands(torch.bfloat16)
        before = torch.randn(N, K, generator=torch.Generator().manual_seed(6))
        w.main_grad, w.grad_added_to_main_grad = before.clone(), False
        emulated_linear(x, w, call(recipe(name))).backward(dy)
        assert w.grad_added_to_main_grad
        assert relative(w.main_grad - before, expected(x, w, dy, recipe(name))[2]) < 1e-3  # fp32 rounding at the size of `before`


def test_nothing_is_quantised_columnwise_without_a_backward_pass():
    x, w, _ = operands()
    with torch.no_grad():
        y = emulated_linear(x, w, call(recipe("paper"), needs_backward=False))
    assert torch.equal(y, emulated_linear(x, w, call(recipe("paper"))))


def test_a_frozen_weight_gets_no_gradient_and_the_input_does():
    x, w, dy = operands()
    w.requires_grad_(False)
    emulated_linear(x, w, call(recipe("nearest"))).backward(dy)
    assert relative(x.grad, expected(x, w, dy, recipe("nearest"))[1]) < 1e-6


def test_flushed_blocks_of_both_directions_of_a_weight_are_counted():
    row_blocks = recipe("rows_of_weights")
    x, w, dy = operands()
    with torch.no_grad():
        w[:, 1::2] *= 1e-9  # every second column, so that whole blocks along N vanish and none along K
    watch = GemmWatch(row_blocks)
    emulated_linear(x, w, call(row_blocks, watch=watch)).backward(dy)
    assert watch.figures["weight/flushed_fraction"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("name", ["paper", "nvidia"])
def test_zeros_are_counted_in_the_weight_gradient_of_this_micro_batch(name, main_grad):
    """A third of the outputs has gradients too small for the format, and an input is always zero. What was accumulated is not looked at."""
    x, w, dy = operands(torch.bfloat16)
    dy[..., ::3] *= 1e-12
    with torch.no_grad():
        x[..., 5] = 0
    if main_grad:
        w.main_grad, w.grad_added_to_main_grad = torch.ones(N, K), False
    watch = GemmWatch(recipe(name))
    emulated_linear(x, w, call(recipe(name), watch=watch)).backward(dy)
    gradient, spec = quantize(dy.flatten(0, -2), recipe(name).grad_output.columnwise, "columnwise", seed=SEED), recipe(name).input
    codes = gradient.decode().double() @ quantize(x.detach().flatten(0, -2), spec.columnwise, "columnwise").decode().double().t()
    share = watch.figures["wgrad/zero_fraction"].item()
    assert share == pytest.approx((codes == 0).double().mean().item())  # without global scales, whose rounding would hide sums of zero
    assert share == pytest.approx(1 - (2 / 3) * (1 - 1 / K), abs=2 / (N * K))


def train(recipe, weights: StepWeights) -> list[list[float]]:
    """Outputs and gradients of three steps of two micro-batches, the weight moved and evaluated behind each."""
    x, w, dy = operands()
    w, seen = torch.nn.Parameter(w.detach()), []
    for _ in range(3):
        with weights.training_step():
            for size in (1.0, 0.9):
                x_now = (x.detach() * size).requires_grad_()
                y = emulated_linear(x_now, w, call(recipe, weights=weights))
                y.backward(dy)
                seen += [y, x_now.grad]
            seen.append(w.grad)
            w.data.sub_(w.grad)  # past autograd's version counter, as a distributed optimizer moves weights
            w.grad = None
        with torch.no_grad():
            seen.append(emulated_linear(x, w, call(recipe, weights=weights, needs_backward=False)))
    return [tensor.flatten().tolist() for tensor in seen]


@pytest.mark.parametrize("name", RECIPES)
def test_kept_weights_change_no_bit_in_steps_of_several_micro_batches_and_evaluations(name, monkeypatch):
    quantised = []
    monkeypatch.setattr(step_weights, "emulate", lambda *args, **options: quantised.append(1) or emulate(*args, **options))
    assert train(recipe(name), StepWeights(keeps=True)) == train(recipe(name), StepWeights(keeps=False))
    assert len(quantised) == (3 if recipe(name).weight_operands else 0)  # once a step


def test_recomputation_reads_the_operands_of_the_first_forward_pass():
    weights, (x, w, dy) = StepWeights(keeps=True), operands()
    with weights.training_step():
        with torch.no_grad():
            first = emulated_linear(x, w, call(recipe("paper"), weights=weights, needs_backward=False))
        again = emulated_linear(x, w, call(recipe("paper"), weights=weights))
        again.backward(dy)
    assert torch.equal(first, again) and x.grad is not None


@pytest.mark.parametrize("name", ["paper", "rows_of_weights"])
def test_a_watched_call_counts_the_same_where_weights_are_kept(name):
    figures = []
    for keeps in (True, False):
        weights, watch = StepWeights(keeps), GemmWatch(recipe(name))
        x, w, dy = operands()
        with torch.no_grad():
            w[:, 1::2] *= 1e-9
            w[0, 0] = 3  # beyond the constant amax
        with weights.training_step():
            emulated_linear(x, w, call(recipe(name), weights=weights)).backward(dy)
            emulated_linear(x, w, call(recipe(name), weights=weights, watch=watch)).backward(dy)
        figures.append({figure: value.item() for figure, value in watch.figures.items()})
    assert figures[0] == figures[1]
    assert figures[0]["weight/saturated_fraction" if name == "paper" else "weight/flushed_fraction"] > 0
