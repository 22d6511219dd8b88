"""Quantisation figures against fp64 loops over their definitions, closed forms, and the true value of a synthetic population."""

import math

import pytest
import torch
from torch import Tensor

from ngpt.precision import QuantizerSpec, quantize
from ngpt.precision.diagnostics import PRODUCT_FIGURES, GemmWatch, clipping_figures, operand_figures, product_figures
from ngpt.precision.hadamard import random_hadamard_transform
from ngpt.precision.recorder import Diagnostics
from ngpt.precision.tensor import Operand
from ngpt.recipes import Recipe

TOKENS, K, N = 48, 64, 32


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def numbers(figures: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in figures.items()}


def decibel(ratio: float) -> float:
    return 10 * math.log10(ratio)


def loop_over_definitions(a: Tensor, b: Tensor, a_hat: Tensor, b_hat: Tensor) -> dict[str, float]:
    """The four figures term by term and pair by pair, in Python's fp64."""
    a, b, a_hat, b_hat = (matrix.double().tolist() for matrix in (a, b, a_hat, b_hat))
    totals = dict.fromkeys(("terms", "dot", "pairs"), (0.0, 0.0))

    def add(name: str, signal: float, noise: float) -> None:
        totals[name] = (totals[name][0] + signal, totals[name][1] + noise)

    reduction = len(a[0])
    for row, row_hat in zip(a, a_hat, strict=True):
        for column, column_hat in zip(b, b_hat, strict=True):
            z = [x * w for x, w in zip(row, column, strict=True)]
            e = [x * w - term for x, w, term in zip(row_hat, column_hat, z, strict=True)]
            add("terms", sum(t * t for t in z), sum(t * t for t in e))
            add("dot", sum(z) ** 2, sum(e) ** 2)
            pairs = [(k, other) for k in range(reduction) for other in range(reduction) if k != other]
            add("pairs", sum(z[k] * z[other] for k, other in pairs), sum(e[k] * e[other] for k, other in pairs))
    correlations = [pairs / ((reduction - 1) * terms) for pairs, terms in zip(totals["pairs"], totals["terms"], strict=True)]
    snrs = [decibel(totals["terms"][0] / totals["terms"][1]), decibel(totals["dot"][0] / totals["dot"][1])]
    return dict(zip(PRODUCT_FIGURES, snrs + correlations, strict=True))


def quantised_rows(x: Tensor) -> Tensor:
    return quantize(x.float(), QuantizerSpec()).dequantize()


def test_product_figures_are_their_definitions(generator):
    a, b = (normal(generator, rows, 16).float() + 0.3 for rows in (5, 4))
    a_hat, b_hat = quantised_rows(a), quantised_rows(b)
    figures = numbers(product_figures(a, b, a_hat, b_hat))
    assert {name: figures[name] for name in PRODUCT_FIGURES} == pytest.approx(loop_over_definitions(a, b, a_hat, b_hat), rel=1e-9)


def test_correlations_explain_what_summation_does_to_the_snr(generator):
    a, b = normal(generator, 20, 64) + 0.5, normal(generator, 24, 64) + 0.5
    figures = numbers(product_figures(a, b, quantised_rows(a), quantised_rows(b)))
    gain = decibel(1 + 63 * figures["signal_correlation"]) - decibel(1 + 63 * figures["noise_correlation"])
    assert figures["dot_snr_db"] - figures["product_snr_db"] == pytest.approx(gain, abs=1e-9)
    # the terms share (0.5^2 / 1.25)^2 = 0.04 of their power; the errors of neighbouring values have little in common
    assert figures["signal_correlation"] == pytest.approx(0.04, abs=0.02)
    assert abs(figures["noise_correlation"]) < 0.01


def test_independent_terms_are_uncorrelated(generator):
    a, b, da = (normal(generator, 64, 512) for _ in range(3))
    figures = numbers(product_figures(a, b, a + 0.1 * da, b))
    # E s^2 / E sum z^2 has a standard deviation of sqrt(2) / 64 over the 64 x 64 entries, and rho is that over K - 1
    assert abs(figures["signal_correlation"]) < 5 * math.sqrt(2) / 64 / 511
    assert abs(figures["noise_correlation"]) < 5 * math.sqrt(2) / 64 / 511
    assert figures["product_snr_db"] == pytest.approx(20, abs=0.2)
    assert figures["dot_snr_db"] == pytest.approx(20, abs=0.3)


def test_identical_terms_are_fully_correlated_and_add_up_to_k_times_the_snr(generator):
    rows, columns = normal(generator, 8, 1).expand(8, 64), normal(generator, 8, 1).expand(8, 64)
    signs = torch.tensor([1.0] * 36 + [-1.0] * 28, dtype=torch.float64)  # their sum, squared, is their number: uncorrelated
    figures = numbers(product_figures(rows, columns, rows * (1 + 0.01 * signs), columns))
    assert figures["signal_correlation"] == pytest.approx(1, rel=1e-12)
    assert figures["product_snr_db"] == pytest.approx(40, abs=1e-6)
    assert figures["noise_correlation"] == pytest.approx(0, abs=1e-12)
    assert figures["dot_snr_db"] == pytest.approx(40 + decibel(64), abs=1e-6)


def test_alternating_terms_reach_the_smallest_correlation():
    a = torch.tensor([[1.0, -1.0] * 8])
    assert numbers(product_figures(a, a.abs(), 2 * a, a.abs()))["signal_correlation"] == pytest.approx(-1 / 15, rel=1e-12)


def test_an_error_proportional_to_the_operand_gains_nothing_by_summation(generator):
    a, b = normal(generator, 16, 64) + 0.5, normal(generator, 16, 64) + 0.5
    figures = numbers(product_figures(a, b, 1.001 * a, b))
    assert figures["product_snr_db"] == pytest.approx(60, abs=1e-6) == figures["dot_snr_db"]
    assert figures["noise_correlation"] == pytest.approx(figures["signal_correlation"], rel=1e-9)


def test_tiny_errors_and_tiny_operands_keep_their_digits(generator):
    for rows, size in ((16, 1e-30), (200, 1e-24), (200, 1e25)):
        a, b = size * normal(generator, rows, 64), normal(generator, rows, 64)
        figures = numbers(product_figures(a, b, a * (1 + 2.0**-40), b))
        assert figures["product_snr_db"] == pytest.approx(20 * 40 * math.log10(2), rel=1e-4)


@pytest.mark.parametrize("rows", [1, 40])
def test_one_row_tells_nothing_of_others(rows, generator):
    a, b = normal(generator, rows, 64), normal(generator, 1 if rows > 1 else 40, 64)
    figures = numbers(product_figures(a, b, quantised_rows(a), quantised_rows(b)))
    assert math.isfinite(figures["dot_snr_db"])
    assert (figures["dot_snr_db_lower"], figures["dot_snr_db_upper"]) == (-math.inf, math.inf)


def test_equal_rows_have_no_spread(generator):
    a, b = normal(generator, 1, 64).expand(256, 64), normal(generator, 1, 64).expand(256, 64)
    figures = numbers(product_figures(a, b, quantised_rows(a), quantised_rows(b)))
    assert figures["dot_snr_db_lower"] == pytest.approx(figures["dot_snr_db"]) == figures["dot_snr_db_upper"]


def test_exact_operands_have_infinite_snrs_and_no_noise_to_correlate(generator):
    a, b = normal(generator, 16, 64), normal(generator, 16, 64)
    figures = numbers(product_figures(a, b, a, b))
    for name in ("product_snr_db", "dot_snr_db"):
        assert [figures[name + suffix] for suffix in ("_lower", "", "_upper")] == [math.inf] * 3
    assert math.isnan(figures["noise_correlation"]) and math.isfinite(figures["signal_correlation"])


def test_a_sample_of_a_large_product_is_drawn_from_all_of_it_and_repeats(generator):
    a, b = normal(generator, 600, 16), normal(generator, 500, 16)
    a_hat, b_hat = quantised_rows(a), quantised_rows(b)
    arguments = (a, b, a_hat, b_hat)
    whole = numbers(product_figures(*arguments, samples=600, resamples=1))
    first, again, other = (numbers(product_figures(*arguments, seed=seed)) for seed in (1, 1, 2))
    assert first == again and first != other
    assert all(abs(first[name] - whole[name]) < 1 for name in ("product_snr_db", "dot_snr_db"))
    a_hat[:300] = a[:300]  # half of the rows exact: the first rows alone would show 3 dB more
    sampled, whole = (numbers(product_figures(*arguments, samples=samples, resamples=1)) for samples in (64, 600))
    assert sampled["product_snr_db"] == pytest.approx(whole["product_snr_db"], abs=1)


def test_strides_do_not_matter(generator):
    a, b = normal(generator, 32, 100), normal(generator, 32, 90)
    figures = product_figures(a.t(), b.t(), 0.9 * a.t(), b.t())
    assert numbers(figures) == pytest.approx(numbers(product_figures(*(m.t().contiguous() for m in (a, b, 0.9 * a, b)))), rel=1e-9)


def population(generator: torch.Generator, rows: int, reduction: int) -> Tensor:
    """Rows of different length with a common part: each row is worth less than its number of elements."""
    return torch.exp(0.4 * normal(generator, rows, 1)) * (0.4 + normal(generator, rows, reduction))


def test_the_interval_covers_the_true_correlation_and_is_not_much_wider_than_it_must_be(generator):
    reduction, rounds = 32, 200
    truth = (0.4**2 / (1 + 0.4**2)) ** 2
    covered, widths, estimates = 0, 0.0, []
    for seed in range(rounds):
        a, b = (population(generator, 24, reduction) for _ in "ab")
        figures = numbers(product_figures(a, b, 1.1 * a, b, seed=seed))
        low, middle, high = (figures["signal_correlation" + suffix] for suffix in ("_lower", "", "_upper"))
        assert low <= middle <= high
        covered += low <= truth <= high
        widths += high - low
        estimates.append(middle)
    spread = torch.tensor(estimates).std().item()
    assert covered >= 0.93 * rounds
    assert 0.9 < widths / rounds / (2 * 1.96 * spread) < 1.7


def test_the_intervals_hold_the_figures_of_the_whole_gemm_as_often_as_they_say_despite_long_rows(generator):
    """Resampling rows and columns by themselves gives percentiles that hold three of the four in every set."""
    sets = 250
    a, b = normal(generator, 512, 1).exp() * normal(generator, 512, 32), normal(generator, 512, 32)
    operands = (a, b, quantised_rows(a), quantised_rows(b))
    truth = numbers(product_figures(*operands, samples=512, resamples=1))
    drawn = [numbers(product_figures(*operands, seed=seed)) for seed in range(sets)]
    for name in PRODUCT_FIGURES:
        covered = sum(figures[name + "_lower"] <= truth[name] <= figures[name + "_upper"] for figures in drawn)
        width = sum(figures[name + "_upper"] - figures[name + "_lower"] for figures in drawn) / sets
        spread = torch.tensor([figures[name] for figures in drawn]).std().item()
        assert 0.9 < width / (2 * 1.96 * spread) < 1.09, name
        assert abs(covered / sets - 0.95) < 3 * math.sqrt(0.95 * 0.05 / sets), name


def test_one_long_row_does_not_decide_the_figures(generator):
    """Drawn with equal chances, the row that has nearly all of the power would be missed in three samples of four."""
    a, b = normal(generator, 256, 32), normal(generator, 256, 32)
    a[77] *= 1000
    for seed in range(8):
        figures = numbers(product_figures(a, b, torch.where(a.abs() > 100, 1.1 * a, 1.001 * a), b, seed=seed))
        assert figures["product_snr_db"] == pytest.approx(20, abs=1)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_operands_without_a_power_have_no_figures_and_raise_nothing(value, generator):
    a, b = torch.full((200, 32), value), normal(generator, 200, 32)
    assert math.isnan(numbers(product_figures(a, b, a, b))["signal_correlation"])


@pytest.mark.parametrize("shape", [(64, 2048), (2049, 2048), (1, 1)])
def test_operand_error_is_the_ratio_of_norms(shape, generator):
    x = normal(generator, *shape).float()
    x_hat = x + 0.01 * normal(generator, *shape).float()
    figures = numbers(operand_figures(x, x_hat))
    expected = ((x_hat.double() - x.double()).norm() / x.double().norm()).item()
    assert figures["relative_error"] == pytest.approx(expected, rel=1e-12)
    assert figures["snr_db"] == pytest.approx(-20 * math.log10(expected), rel=1e-12)
    assert numbers(operand_figures(x, 4 * x_hat, torch.tensor([0.25]))) == figures


def test_a_uniform_quantiser_has_its_textbook_snr(generator):
    x = 2 * torch.rand(256, 1024, generator=generator, dtype=torch.float64) - 1
    step = 2.0**-6
    # power 1/3 over noise step^2 / 12
    assert numbers(operand_figures(x, (x / step).round() * step))["snr_db"] == pytest.approx(decibel(4 / step**2), abs=0.05)


def test_gaussian_data_has_the_known_error_of_nvfp4(generator):
    x = normal(generator, 256, 1024).float()
    assert numbers(operand_figures(x, quantised_rows(x)))["relative_error"] == pytest.approx(0.0951, abs=0.0005)


def test_operand_error_of_extremes(generator):
    x = normal(generator, 16, 16)
    assert numbers(operand_figures(x, x)) == {"relative_error": 0, "snr_db": math.inf}
    assert numbers(operand_figures(x, torch.zeros_like(x))) == {"relative_error": 1, "snr_db": 0}
    assert all(math.isnan(value) for value in numbers(operand_figures(torch.zeros(16, 16), torch.zeros(16, 16))).values())
    assert numbers(operand_figures(1e-30 * x.float(), 2e-30 * x.float()))["relative_error"] == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(("block_shape", "blocks"), [((1, 16), 128), ((16, 16), 8)])
def test_clipping_counts_elements_and_blocks_of_the_worse_direction(block_shape, blocks):
    figures = numbers(clipping_figures(torch.tensor([[512, 1], [256, 4]]), 2048, QuantizerSpec(block_shape)))
    assert figures == {"saturated_fraction": 0.25, "flushed_fraction": 4 / blocks}


def recipe(rht: str) -> Recipe:
    specs = {"input": QuantizerSpec(rht=rht), "weight": QuantizerSpec(block_shape=(16, 16)), "grad_output": QuantizerSpec(rht=rht)}
    return Recipe(name="test", dtype="fp32", format="nvfp4", **specs)


def operand(x: Tensor, spec: QuantizerSpec, direction: str, folded: bool = False) -> Operand:
    """In logical orientation; `folded`: with its global scale."""
    stored = quantize(x, spec, direction)
    values = stored.dequantize() if folded else stored.decode()
    return Operand(values if direction == "rowwise" else values.t(), None if folded else stored.global_amax, stored.e4m3_bound)


def tensors(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, w, dy = (normal(generator, *shape).float() for shape in ((TOKENS, K), (N, K), (TOKENS, N)))
    return x, w, 1e-6 * dy * torch.exp(normal(generator, TOKENS, 1).float())


def watched(watch: GemmWatch, x: Tensor, w: Tensor, dy: Tensor, folded: bool = False) -> dict[str, Tensor]:
    """Both passes of a linear layer; returns its operands."""
    specs = watch.specs
    quantised = {
        "x_row": operand(x, specs["input"], "rowwise", folded),
        "x_col": operand(x, specs["input"], "columnwise", folded),
        "w_row": operand(w, specs["weight"], "rowwise", folded),
        "w_col": operand(w, specs["weight"], "columnwise", folded),
        "dy_row": operand(dy, specs["grad_output"], "rowwise", folded),
        "dy_col": operand(dy, specs["grad_output"], "columnwise", folded),
    }
    watch.forward(x, w, quantised["x_row"], quantised["w_row"])
    watch.backward(dy, w, *(quantised[name] for name in ("dy_row", "w_col", "dy_col", "x_col")))
    return {name: o.values if folded else o.values.double() * o.decode_factor for name, o in quantised.items()}


@pytest.mark.parametrize("rht", ["off", "signed"])
@pytest.mark.parametrize("folded", [False, True])
def test_each_gemm_is_compared_with_its_own_exact_product(rht, folded, generator):
    x, w, dy = tensors(generator)
    watch = GemmWatch(recipe(rht))
    hat = watched(watch, x, w, dy, folded)
    products = {
        "fprop": (x @ w.t(), hat["x_row"] @ hat["w_row"].t()),
        "dgrad": (dy @ w, hat["dy_row"] @ hat["w_col"]),
        # the transform of both operands cancels in the exact product, but for its rounding to bf16
        "wgrad": (dy.double().t() @ x.double(), hat["dy_col"].t() @ hat["x_col"]),
    }
    for gemm, (exact, quantised) in products.items():
        error = ((quantised.double() - exact.double()).norm() / exact.double().norm()).item()
        tolerance = 0.1 if gemm == "wgrad" and rht == "signed" else 1e-3
        assert watch.figures[f"{gemm}/dot_snr_db"].item() == pytest.approx(-20 * math.log10(error), abs=tolerance)
    for name, exact in {"input": (x, "x_row"), "weight": (w, "w_row"), "grad_output": (dy, "dy_row")}.items():
        error = ((hat[exact[1]].double() - exact[0].double()).norm() / exact[0].double().norm()).item()
        assert watch.figures[f"{name}/relative_error"].item() == pytest.approx(error, rel=1e-6)


def test_terms_of_wgrad_are_those_of_the_rotated_domain(generator):
    x, w, dy = tensors(generator)
    watch = GemmWatch(recipe("signed"))
    hat = watched(watch, x, w, dy)
    a, b = (random_hadamard_transform(tensor.t().contiguous()) for tensor in (dy, x))
    expected = numbers(product_figures(a, b, hat["dy_col"].t(), hat["x_col"].t()))
    for name in PRODUCT_FIGURES:  # the bounds come of other resamples
        assert watch.figures[f"wgrad/{name}"].item() == pytest.approx(expected[name], rel=1e-6)


def test_operands_and_their_quantised_forms_are_sampled_at_the_same_places(generator):
    """A sample of mismatched rows or columns would show an error of the size of the signal."""
    x, w, dy = tensors(generator)
    watch = GemmWatch(recipe("signed"), samples=8)
    watched(watch, x, w, dy)
    for gemm in ("fprop", "dgrad", "wgrad"):
        assert 10 < watch.figures[f"{gemm}/product_snr_db"].item() < 30


@pytest.mark.parametrize(
    ("name", "dim", "gemm"),
    [("x", 0, "fprop"), ("w", 0, "fprop"), ("dy", 0, "dgrad"), ("w", 1, "dgrad"), ("dy", 1, "wgrad"), ("x", 1, "wgrad")],
)
def test_each_gemm_weighs_the_rows_that_it_draws_by_their_power(name, dim, gemm, generator):
    """One row with half of the power has an error of 1 / 10, all else is exact. Drawn by power but undivided, it would count twice."""
    exact = dict(zip(("x", "w", "dy"), (normal(generator, *shape) for shape in ((TOKENS, K), (N, K), (TOKENS, N))), strict=True))
    exact[name].select(dim, 7).mul_(math.sqrt(exact[name].size(dim) - 1))
    hat = {operand_name: matrix.clone() for operand_name, matrix in exact.items()}
    hat[name].select(dim, 7).mul_(1.1)
    x, w, dy = (Operand(hat[operand_name], None, 448) for operand_name in ("x", "w", "dy"))
    ratios = []
    for seed in range(8):
        watch = GemmWatch(recipe("off"), samples=24, resamples=1, seed=seed)
        watch.forward(exact["x"], exact["w"], x, w)
        watch.backward(exact["dy"], exact["w"], dy, w, dy, x)
        ratios.append(10 ** (-watch.figures[f"{gemm}/product_snr_db"].item() / 10))
    a, b = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}[gemm]
    long, powers = exact[name].select(dim, 7).square(), exact[name].square().sum(dim=dim)
    other = exact[b if name == a else a].square()
    reduced = other.sum(dim=0 if other.size(1) == long.numel() else 1)
    assert sum(ratios) / 8 == pytest.approx((0.01 * (long * reduced).sum() / (powers * reduced).sum()).item(), rel=0.15)


def test_the_recorder_names_every_figure_and_watches_the_first_call_with_a_backward_pass(generator):
    x, w, dy = tensors(generator)
    diagnostics = Diagnostics(samples=16, resamples=20)
    assert diagnostics.figures() == {}
    with torch.no_grad():
        assert diagnostics.watch("layers.0.mlp.linear_fc1", recipe("signed")) is None
    watch = diagnostics.watch("layers.0.mlp.linear_fc1", recipe("signed"))
    assert diagnostics.watch("layers.0.mlp.linear_fc1", recipe("signed")) is None
    assert diagnostics.watch("layers.1.mlp.linear_fc1", recipe("signed")) is not None
    for name, counts in {"input": [[TOKENS * K // 2, 0], [0, 3]], "weight": [[0, 1], [0, 0]], "grad_output": [[0, 0], [0, 0]]}.items():
        counters = watch.counters(name, x.device)
        counters += torch.tensor(counts)
        assert torch.equal(watch.counters(name, x.device), torch.tensor(counts))
    watched(watch, x, w, dy)
    watch.weight_gradient(torch.tensor([[0.0, -0.0, 1e-45, -1.0], [math.inf, math.nan, 2.0, 3.0]]))
    figures = diagnostics.figures()
    operand_names = {f"{o}/{f}" for o in watch.specs for f in ("relative_error", "snr_db", "saturated_fraction", "flushed_fraction")}
    products = {f"{g}/{f}{s}" for g in ("fprop", "dgrad", "wgrad") for f in PRODUCT_FIGURES for s in ("", "_lower", "_upper")}
    assert set(figures) == {f"precision/layers.0.mlp.linear_fc1/{figure}" for figure in operand_names | products | {"wgrad/zero_fraction"}}
    assert all(type(value) is float and math.isfinite(value) for value in figures.values())
    prefix = "precision/layers.0.mlp.linear_fc1"
    assert figures[f"{prefix}/input/saturated_fraction"] == 0.5
    assert figures[f"{prefix}/input/flushed_fraction"] == 3 * 16 / (TOKENS * K)
    assert figures[f"{prefix}/weight/flushed_fraction"] == 256 / (N * K)
    assert figures[f"{prefix}/wgrad/zero_fraction"] == 0.25


def test_fractions_are_left_out_where_nothing_was_counted(generator):
    watch = GemmWatch(recipe("off"))
    watched(watch, *tensors(generator))
    assert not any(name.endswith("fraction") for name in watch.figures)


def numbers_held(value: object) -> int:
    """Elements of all tensors that an object keeps, but for single numbers."""
    if isinstance(value, Tensor):
        return value.numel() if value.dim() else 0
    if isinstance(value, list | tuple):
        return sum(map(numbers_held, value))
    return sum(map(numbers_held, (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()))


def test_what_is_sampled_is_held_between_the_passes_only(generator):
    x, w, dy = tensors(generator)
    watch, specs = GemmWatch(recipe("off"), samples=8), recipe("off").operands
    watch.forward(x, w, operand(x, specs["input"], "rowwise"), operand(w, specs["weight"], "rowwise"))
    assert 8 * TOKENS <= numbers_held(watch) < x.numel()
    watch.backward(
        dy, w, operand(dy, specs["grad_output"], "rowwise"), operand(w, specs["weight"], "columnwise"),
        operand(dy, specs["grad_output"], "columnwise"), operand(x, specs["input"], "columnwise"),
    )  # fmt: skip
    assert numbers_held(watch) == 0
