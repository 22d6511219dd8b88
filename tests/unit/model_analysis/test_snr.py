"""Captured operands against autograd's weight gradients, figures against their definitions, intervals against a known truth."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import NVIDIA, ids, model_of

from ngpt.config import compose
from ngpt.config.linears import block_linears as linears_of_config
from ngpt.model_analysis.capture import captured
from ngpt.model_analysis.intervals import text_interval
from ngpt.model_analysis.linears import block_linears
from ngpt.model_analysis.snr import BatchWatch, figures_of_powers, snr
from ngpt.precision import quantize
from ngpt.precision.diagnostics import Draw, powers_of_rows
from ngpt.recipes import QuantizerSpec

EXPERIMENTS = ["ngpt_hybrid_tiny", "gpt_hybrid_tiny", "ngpt_tiny"]
SWIGLU = "model.activation=swiglu"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("words", [(), (SWIGLU,)])
def test_captured_operands_give_the_gradient_of_every_weight(experiment, words):
    model, tokens = model_of(experiment, *words).double(), ids(2, 12)
    linears = block_linears(model)
    cfg = compose([f"experiment={experiment}", *words])
    assert [linear.name for linear in linears] == [linear.name for linear in linears_of_config(cfg)]
    F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    wanted = {linear.name: linear.join([parameter.grad for parameter in linear.parameters]) for linear in linears}
    seen: dict[str, set] = {linear.name: set() for linear in linears}
    for calls in captured(model, linears, tokens):
        for call in calls:
            gradient = wanted[call.linear.name] if call.expert is None else wanted[call.linear.name][call.expert]
            torch.testing.assert_close(call.grad_output().t() @ call.x_MK, gradient, rtol=1e-9, atol=1e-12)
            seen[call.linear.name].add(call.expert)
    for linear in linears:
        without = {expert for expert, part in enumerate(wanted[linear.name]) if not part.any()} if linear.stacked else set()
        assert seen[linear.name] == (set(range(len(linear.weight()))) - without if linear.stacked else {None})
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_figures_are_their_definitions_with_the_operands_of_the_reference_quantiser():
    """All rows of fprop, element by element in fp64."""
    generator = torch.Generator().manual_seed(4)
    x, w = torch.randn(48, 32, generator=generator) + 0.3, torch.randn(16, 32, generator=generator)
    x_hat, w_hat = (quantize(m, spec).dequantize().double() for m, spec in ((x, QuantizerSpec()), (w, QuantizerSpec((16, 16)))))
    z = x.double()[:, None] * w.double()[None]
    e = x_hat[:, None] * w_hat[None] - z
    reduction = z.shape[2]
    off = 1 - torch.eye(reduction, dtype=torch.float64)
    rho = {
        name: float(torch.einsum("mnk,mnl,kl->", t, t, off) / (reduction - 1) / t.square().sum()) for name, t in (("z", z), ("e", e))
    }
    dot = float(10 * (z.sum(2).square().sum() / e.sum(2).square().sum()).log10())
    product = float(10 * (z.square().sum() / e.square().sum()).log10())
    of_row = torch.einsum("mnk,mnl,kl->m", z, z, off) / (reduction - 1) / z.square().sum((1, 2))

    every = Draw(torch.arange(48), torch.ones(48, 1)), Draw(torch.arange(16), torch.ones(16, 1))
    found = figures_of_powers(powers_of_rows(every, (x, w), (x_hat, w_hat)), reduction)
    numbers = {name: value.item() for name, value in found.items() if value.dim() == 0}
    assert numbers["signal_correlation"] == pytest.approx(rho["z"]) and numbers["noise_correlation"] == pytest.approx(rho["e"])
    assert numbers["dot_snr_db"] == pytest.approx(dot) and numbers["product_snr_db"] == pytest.approx(product)
    assert numbers["averaging_gain_db"] == pytest.approx(dot - product)
    assert numbers["signal_gain_db"] - numbers["noise_gain_db"] == pytest.approx(dot - product)
    edges = [-1, -0.1, -0.03, -0.01, -0.003, -0.001, 0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1]
    assert found["row_correlation_counts"].tolist() == np.histogram(of_row, edges)[0].tolist()


def test_every_linear_of_a_hybrid_has_figures():
    model, tokens = model_of("ngpt_hybrid_tiny"), ids(8, 32)
    found = snr(model, tokens, NVIDIA, batch_size=2, samples=16)
    assert list(found["linears"]) == [linear.name for linear in block_linears(model)] and found["batches"] == 4
    assert set(found["kinds"]) == {name.partition(".")[2].partition(".")[2] for name in found["linears"]}
    for figures in [*found["linears"].values(), *found["kinds"].values(), found["all"]]:
        for gemm in ("fprop", "dgrad", "wgrad"):
            interval = figures[gemm]["averaging_gain_db"]
            assert interval["lower"] < interval["value"] < interval["upper"]
            means = [half["averaging_gain_db"]["value"] for half in figures[gemm]["halves"].values()]
            assert sum(means) / 2 == pytest.approx(interval["value"])
        assert 14 < figures["fprop"]["product_snr_db"]["value"] < 20
        assert 0.05 < figures["input"]["relative_error"]["value"] < 0.2


def test_halves_share_no_token():
    model, tokens = model_of("ngpt_tiny"), ids(8, 32)
    even = snr(model, tokens.view(4, 2, -1)[::2].flatten(0, 1), NVIDIA, batch_size=2, samples=10**6)
    whole = snr(model, tokens, NVIDIA, batch_size=2, samples=10**6)
    linear = "layers.3.mlp.linear_fc2"
    for figure in ("dot_snr_db", "signal_correlation"):  # all rows: no draws, and fprop rounds to nearest
        half = whole["linears"][linear]["fprop"]["halves"]["even"][figure]
        assert even["linears"][linear]["fprop"][figure]["value"] == pytest.approx(half["value"], rel=1e-9)


def test_intervals_hold_the_figures_of_text_that_was_not_read():
    """Batches of tokens that share a direction of the batch: the mean over 8 of them is held as often as claimed."""
    random, size, features, batches = torch.Generator().manual_seed(6), 8, 32, 960
    w = torch.randn(24, features, generator=random)
    w_hat = _rounded(w)
    truths, estimates = [], []
    for number in range(batches):
        x = torch.randn(48, features, generator=random) + torch.randn(1, features, generator=random)
        x_hat = _rounded(x)
        every = Draw(torch.arange(48), torch.ones(48, 1)), Draw(torch.arange(24), torch.ones(24, 1))
        truths.append(_vector(powers_of_rows(every, (x, w), (x_hat, w_hat)), features))
        watch = BatchWatch(NVIDIA, samples=16)
        watch._generator = torch.Generator().manual_seed(number)
        draws = watch._draw(x), watch._draw(w)
        rows = [tuple(m[draw.rows] for m, draw in zip(pair, draws, strict=True)) for pair in ((x, w), (x_hat, w_hat))]
        estimates.append(_vector(powers_of_rows(draws, *rows), features))
    truth = torch.stack(truths).mean(dim=0)
    sets = torch.stack(estimates).view(batches // size, size, -1)
    for figure, whole in enumerate(truth):
        intervals = [text_interval(one[:, figure].tolist()) for one in sets]
        held = sum(found["lower"] <= whole <= found["upper"] for found in intervals) / len(sets)
        assert 0.90 < held < 0.99, figure  # 0.95 with a standard error of 0.02


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).round() / 2


def _vector(powers: torch.Tensor, reduction: int) -> torch.Tensor:
    found = figures_of_powers(powers, reduction)
    return torch.stack([found[name] for name in ("product_snr_db", "dot_snr_db", "signal_correlation", "averaging_gain_db")])
