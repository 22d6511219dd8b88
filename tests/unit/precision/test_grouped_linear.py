"""The emulated linears of all experts in one call, against `emulated_linear` of each expert alone: the same bits."""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from megatron_ext.precision import grouped
from megatron_ext.precision.grouped import ExpertTokens, emulated_grouped_linear, grouped_linear
from megatron_ext.precision.linear import LinearCall, emulated_linear
from megatron_ext.precision.weights import StepWeights
from ngpt.config import compose
from ngpt.config.recipes import recipe_of
from ngpt.precision import QuantizedTensor, QuantizerSpec, quantize
from ngpt.precision.diagnostics import GemmWatch
from ngpt.precision.formats import decode_e4m3
from ngpt.recipes import Direction, Recipe

K, N = 48, 80
SIZES = [19, 0, 32, 1, 70, 0]
GRADIENT_SIZES = [1.0, 1.0, 3e-7, 0.0, 40.0, 1.0]  # of each expert: their power-of-two scales differ; the fourth has only zeros
PAPER, STATIC = ["precision=nvfp4_paper"], ["precision=nvfp4_static", "precision.static_grad_amax=10.5"]
NEAREST = {
    "paper": PAPER,
    "static": STATIC,
    "rows_of_weights": [*PAPER, "precision.weight_blocks=1x16"],
}


@functools.cache
def recipe(*overrides: str, rounding: bool = False) -> Recipe:
    nearest = [] if rounding else ["precision.stochastic_rounding=false"]
    return recipe_of(compose(["experiment=ngpt_hybrid_tiny", *overrides, *nearest]).precision)


def operands(dtype=torch.float32, sizes=SIZES, main_grad=False) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, stacked weight and grad_output."""
    generator = torch.Generator().manual_seed(11)
    x = normalize(torch.randn(sum(sizes), K, generator=generator), dim=-1).to(dtype).requires_grad_()
    weight = normalize(torch.randn(len(sizes) * N, K, generator=generator), dim=-1).to(dtype).requires_grad_()
    factors = torch.tensor(GRADIENT_SIZES[: len(sizes)]).repeat_interleave(torch.tensor(sizes))
    dy = (torch.randn(sum(sizes), N, generator=generator) * factors[:, None]).to(dtype)
    if main_grad:
        weight.main_grad, weight.grad_added_to_main_grad = torch.randn(len(sizes) * N, K, generator=generator), False
    return x, weight, dy


def call(recipe: Recipe, seed: int = 5, **options) -> LinearCall:
    return LinearCall(recipe=recipe, rounding_seed=lambda: seed, **options)


def alone(x: Tensor, weight: Tensor, sizes: list[int], call: LinearCall) -> Tensor:
    """Each expert by itself, as Megatron runs them one by one."""

    def product(x: Tensor, own: Tensor) -> Tensor:
        if not len(x):
            return x @ own.t()
        return emulated_linear(pad(x, (0, 0, 0, -len(x) % 32)), own, call)[: len(x)]

    return torch.cat([product(*pair) for pair in zip(x.split(sizes), matrices(weight, len(sizes)), strict=True)])


def matrices(weight: Tensor, experts: int) -> list[Tensor]:
    """Each expert's matrix as a leaf whose gradients end in those of the stacked weight."""
    own = [matrix.detach().requires_grad_(weight.requires_grad) for matrix in weight.chunk(experts)]
    weight.grad = torch.zeros_like(weight)
    for index, matrix in enumerate(own):
        matrix.grad = weight.grad.chunk(experts)[index]
        if hasattr(weight, "main_grad"):
            matrix.main_grad, matrix.grad_added_to_main_grad = weight.main_grad.chunk(experts)[index], False
    return own


def run(linear, recipe: Recipe, *, sizes=SIZES, seed: int = 5, watch=None, **options) -> list[Tensor]:
    """Output, gradient of the input, gradients of the weights, wherever those are."""
    x, weight, dy = operands(sizes=sizes, **options)
    y = linear(x, weight, sizes, call(recipe, seed, watch=watch))
    y.backward(dy)
    return [y.detach(), x.grad, *getattr(weight, "main_grad", weight.grad).chunk(len(sizes))]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("main_grad", [False, True], ids=["grad", "main_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NEAREST)
def test_every_bit_is_that_of_each_expert_alone(name, dtype, main_grad):
    options = dict(dtype=dtype, main_grad=main_grad)
    ours, wanted = (run(linear, recipe(*NEAREST[name]), **options) for linear in (emulated_grouped_linear, alone))
    assert equal(ours, wanted)
    assert all(result.any() for result in (*ours[:3], ours[6]))


@pytest.mark.parametrize("sizes", [[32, 64], [0, 96], [7], [0, 1]], ids=str)
def test_sizes_that_fit_and_those_that_do_not(sizes):
    ours, wanted = (run(linear, recipe(*PAPER), sizes=sizes) for linear in (emulated_grouped_linear, alone))
    assert equal(ours, wanted)


def test_tokens_that_fit_are_neither_copied_nor_looked_up():
    x = torch.zeros(96, K)
    tokens = ExpertTokens([32, 0, 64], x.device)
    assert tokens.fill_up(x) is x and tokens.take(x) is x


def test_more_padding_changes_no_bit(monkeypatch):
    monkeypatch.setattr(grouped, "_tokens", grouped._tokens.__wrapped__)  # nothing of another multiple is kept
    results = []
    for multiple in (32, 128):
        monkeypatch.setattr(grouped, "TOKEN_MULTIPLE", multiple)
        results.append(run(emulated_grouped_linear, recipe(*PAPER)))
        assert ExpertTokens(SIZES, torch.device("cpu")).filled.sizes == [-(-size // multiple) * multiple for size in SIZES]
    assert equal(*results)


def test_micro_batches_add_up_in_main_grad():
    """And Megatron is told so: its hook must not add the gradient once more."""
    both = []
    for linear in (emulated_grouped_linear, alone):
        x, weight, dy = operands(torch.bfloat16, main_grad=True)
        before = weight.main_grad.clone()
        for factor in (1, 3):
            linear(x, weight, SIZES, call(recipe(*PAPER))).backward(factor * dy)
        both.append(weight.main_grad)
    assert torch.equal(*both)
    x, weight, dy = operands(torch.bfloat16, main_grad=True)
    emulated_grouped_linear(x, weight, SIZES, call(recipe(*PAPER))).backward(dy)
    assert weight.grad_added_to_main_grad
    changed = [not torch.equal(*pair) for pair in zip(weight.main_grad.chunk(len(SIZES)), before.chunk(len(SIZES)), strict=True)]
    assert changed == [True, False, True, False, True, False]


def test_without_a_backward_pass_the_output_is_the_same():
    x, weight, _ = operands()
    with torch.no_grad():
        y = emulated_grouped_linear(x, weight, SIZES, call(recipe(*PAPER), needs_backward=False))
    assert torch.equal(y, run(emulated_grouped_linear, recipe(*PAPER))[0])


@pytest.mark.parametrize("name", NEAREST)
def test_weights_that_are_kept_through_a_step_change_no_bit(name):
    results = []
    for keeps in (False, True):
        weights, (x, weight, dy) = StepWeights(keeps), operands(main_grad=True)
        with weights.training_step():
            for _ in range(2):
                emulated_grouped_linear(x, weight, SIZES, call(recipe(*NEAREST[name]), weights=weights)).backward(dy)
            assert (weights.operands(weight, recipe(*NEAREST[name]), torch.float32) is not None) is keeps
        results.append([x.grad, weight.main_grad])
    assert equal(*results)


def test_frozen_weights_get_no_gradient_and_the_input_does():
    x, weight, dy = operands()
    weight.requires_grad_(False)
    emulated_grouped_linear(x, weight, SIZES, call(recipe(*PAPER))).backward(dy)
    assert torch.equal(x.grad, run(emulated_grouped_linear, recipe(*PAPER))[1])
    assert weight.grad is None


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_infinite_gradient_stays_with_its_expert(value):
    x, weight, dy = operands()
    dy[20, 3] = value  # of the third expert
    emulated_grouped_linear(x, weight, SIZES, call(recipe(*PAPER))).backward(dy)
    finite = [part.isfinite().all().item() for part in x.grad.split(SIZES)]
    assert finite == [True, True, False, True, True, True]
    assert [part.isfinite().all().item() for part in weight.grad.chunk(len(SIZES))] == finite


def test_stochastic_rounding_repeats_with_its_seed_and_with_no_other():
    first, again, other = (run(emulated_grouped_linear, recipe(*PAPER, rounding=True), seed=seed) for seed in (3, 3, 4))
    assert equal(first, again)
    assert torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1]) and not torch.equal(first[2], other[2])


def test_stochastic_rounding_is_right_on_average():
    """Means over seeds lie where products with the unrounded grad_output do, as near as the spread of the draws lets them."""
    draws, sizes, rounded = 300, [19, 0, 32, 1], recipe(*PAPER, rounding=True)
    results = [run(emulated_grouped_linear, rounded, sizes=sizes, seed=seed)[1:] for seed in range(draws)]
    for index, wanted in enumerate(without_rounding(sizes, rounded)):
        drawn = torch.stack([result[index] for result in results]).double()
        spread, error = drawn.std(0), drawn.mean(0) - wanted
        random = spread > 1e-6 * wanted.abs().max()
        assert random.any() == wanted.any() and (error[~random].abs() <= 1e-5 * wanted.abs().max()).all()
        z = error[random] / (spread[random] / draws**0.5)
        assert not z.numel() or (z.abs().max() < 5 and abs(z.square().mean() - 1) < 0.5)


def without_rounding(sizes: list[int], recipe: Recipe) -> list[Tensor]:
    """fp64 gradients of input and weights with a grad_output that is clipped at its blocks' largest values, but not rounded."""
    x, stacked, dy = operands(sizes=sizes)
    dx, dw = [], []
    for rows, grads, weight in zip(x.detach().split(sizes), dy.split(sizes), stacked.chunk(len(sizes)), strict=True):
        rows, grads = (pad(matrix, (0, 0, 0, 64 - len(matrix))) for matrix in (rows, grads))
        w_col = dequantized(quantize(weight.detach(), recipe.weight, "columnwise")).t()
        dx.append(clipped(grads, recipe.grad_output, "rowwise") @ w_col)
        x_col = dequantized(quantize(rows, recipe.input, "columnwise")).t()
        dw.append(clipped(grads, recipe.grad_output, "columnwise").t() @ x_col)
    return [torch.cat([part[:size] for part, size in zip(dx, sizes, strict=True)]), *dw]


def dequantized(stored: QuantizedTensor) -> Tensor:
    return stored.decode().double() * stored.decode_factor


def clipped(dy: Tensor, spec: QuantizerSpec, direction: Direction) -> Tensor:
    stored = quantize(dy, spec, direction, seed=0)
    largest = 6 * decode_e4m3(stored.block_decode_scale).double() * stored.decode_factor
    largest = largest.repeat_interleave(16, dim=1)
    return dy.double().clamp(*((-largest, largest) if direction == "rowwise" else (-largest.t(), largest.t())))


@pytest.mark.parametrize("name", ["paper", "static"])
def test_the_first_expert_with_tokens_is_watched_as_if_it_were_alone(name):
    sizes = [0, 19, 40]
    found = []
    for linear in (emulated_grouped_linear, None):
        watch = GemmWatch(recipe(*NEAREST[name]))
        x, weight, dy = operands(sizes=sizes)
        if linear:
            linear(x, weight, sizes, call(recipe(*NEAREST[name]), watch=watch)).backward(dy)
        else:
            own = weight.detach().chunk(len(sizes))[1].requires_grad_()
            y = alone(x[:19], own, [19], call(recipe(*NEAREST[name]), watch=watch))
            y.backward(dy[:19])
        found.append(watch.figures)
    assert len(found[0]) > 40 and list(found[0]) == list(found[1])
    assert all(torch.equal(found[0][key].nan_to_num(), found[1][key].nan_to_num()) for key in found[0])


def test_a_gradient_under_a_scale_of_its_whole_tensor_would_be_seen():
    """The experts' scales differ so much that one for all of them gives other bits: the tests above compare something."""
    nearest = recipe(*PAPER)
    static = dataclasses.replace(nearest, grad_output=dataclasses.replace(nearest.grad_output, global_amax="static", static_amax=168.0))
    assert not equal(run(emulated_grouped_linear, static), run(emulated_grouped_linear, nearest))


@pytest.mark.parametrize("main_grad", [False, True], ids=["grad", "main_grad"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2.0**-21), (torch.bfloat16, 2.0**-8)], ids=str)
@pytest.mark.parametrize("sizes", [SIZES, [0, 96], [7], [0, 0]], ids=str)
def test_the_linear_in_high_precision_is_that_of_fp64(sizes, dtype, bound, main_grad):
    """Twice, so that sums of micro-batches are seen. A result is within one rounding of its dtype, sums in fp32."""
    x, weight, dy = operands(dtype, sizes, main_grad)
    total = weight.main_grad.double() if main_grad else 0
    for _ in range(2):
        x.grad = None
        y = grouped_linear(x, weight, sizes)
        y.backward(dy)
    own = zip(x.detach().double().split(sizes), dy.double().split(sizes), weight.detach().double().chunk(len(sizes)), strict=True)
    wanted_y, wanted_dx, dw = (list(parts) for parts in zip(*((a @ w.t(), g @ w, 2 * g.t() @ a) for a, g, w in own), strict=True))
    assert_near(y, torch.cat(wanted_y), bound)
    assert_near(x.grad, torch.cat(wanted_dx), bound)
    assert_near(weight.main_grad if main_grad else weight.grad, torch.cat(dw) + total, 2.0**-21 if main_grad else bound)
    assert not main_grad or weight.grad_added_to_main_grad


def assert_near(found: Tensor, wanted: Tensor, bound: float) -> None:
    assert found.shape == wanted.shape
    assert not wanted.numel() or (found.double() - wanted).abs().max() <= bound * max(1.0, wanted.abs().max().item())


def test_a_frozen_expert_weight_gets_no_gradient_and_the_input_does():
    x, weight, dy = operands()
    weight.requires_grad_(False)
    grouped_linear(x, weight, SIZES).backward(dy)
    assert weight.grad is None and x.grad.any()
