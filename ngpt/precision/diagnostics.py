"""What quantisation costs a linear layer: errors of its operands, of the products of their elements, and of its dot products.

One GEMM D_MN = a_MK b_NK^T is computed from dequantised operands a_hat, b_hat. Of an output entry (m, n):

    signal terms  z_k = a_mk b_nk,                        dot product  s = sum_k z_k = D_mn
    noise terms   e_k = a_hat_mk b_hat_nk - a_mk b_nk,    its error    r = sum_k e_k

With E the mean over output entries and t standing for z or e:

    product SNR (dB) = 10 lg (E sum_k z_k^2 / E sum_k e_k^2)
    dot SNR (dB)     = 10 lg (E s^2 / E r^2)
    rho(t)           = E sum_{k != l} t_k t_l / ((K - 1) E sum_k t_k^2), between -1 / (K - 1) and 1

rho is the mean correlation of the K (K - 1) pairs of terms, weighted by their power: the plain mean where all terms have the same power.
It is uncentred: no mean is subtracted. What the terms have in common in every entry is signal that adds up coherently, and what their
errors have in common is a bias that does not average out, so both belong to the ratio of powers that an SNR is. For the same reason
E (sum_k t_k)^2 = (1 + (K - 1) rho(t)) E sum_k t_k^2 holds exactly, on any sample of entries, and with it the mechanism to be watched:

    dot SNR - product SNR = 10 lg (1 + (K - 1) rho(z)) - 10 lg (1 + (K - 1) rho(e))

Summation raises the SNR where the signal terms are correlated (coherent, rho(z) > 0) while the noise averages out (rho(e) near 0).

Source: the mechanism is that of arXiv 2605.06067; these estimators and their intervals are derived here.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ngpt.precision.hadamard import random_hadamard_transform
from ngpt.precision.tensor import Operand
from ngpt.recipes import DIRECTIONS, OperandSpec, Recipe

SAMPLES = 64
RESAMPLES = 199
CONFIDENCE = 0.95
PRODUCT_FIGURES = ("product_snr_db", "dot_snr_db", "signal_correlation", "noise_correlation")
_NO_SPREAD = 1e-12  # of a logarithm: the spread that rounding alone gives equal rows
_CHUNK_ELEMENTS = 2**22  # of a tensor in fp64 at a time: 32 MiB


class Draw(NamedTuple):
    """Rows sampled from a matrix: their indices, int64 [samples], and the divisor of each, fp64 [samples, 1]."""

    rows: Tensor
    norms: Tensor


def operand_figures(x: Tensor, x_hat: Tensor, global_decode_scale: Tensor | None = None) -> dict[str, Tensor]:
    """Error of a quantised tensor, over all of its elements.

    relative_error = ||x_hat - x|| / ||x|| (Frobenius), snr_db = -20 lg relative_error. A tensor of zeros has neither (NaN).

    Args:
        x: [M, K], any floating dtype.
        x_hat: [M, K], the dequantised tensor.
        global_decode_scale: [1] factor that x_hat still lacks.

    Returns:
        fp64 scalars on x's device; nothing is synchronised. Needs about 0.1 GB of temporary memory.
    """
    error, power = torch.zeros(2, dtype=torch.float64, device=x.device)
    rows = max(1, _CHUNK_ELEMENTS // max(1, x.size(1)))
    for chunk, chunk_hat in zip(x.split(rows), x_hat.split(rows), strict=True):
        exact, approximate = chunk.double(), _scaled(chunk_hat.double(), global_decode_scale)
        error = error + (approximate - exact).square().sum()
        power = power + exact.square().sum()
    return {"relative_error": (error / power).sqrt(), "snr_db": _decibel(power / error)}


def clipping_figures(counters: Tensor, elements: int, spec: OperandSpec) -> dict[str, Tensor]:
    """Shares of an operand that its quantisers clipped or lost, taken from the worse of its two directions.

    Args:
        counters: int64 [2, 2], (rowwise, columnwise) by (elements beyond the global amax, nonzero blocks whose scale rounded to zero).
        elements: of the tensor.
        spec: of its quantiser.

    Returns:
        fp64 scalars saturated_fraction (of elements) and flushed_fraction (of blocks).
    """
    row, column = (math.prod(getattr(spec, direction).block_shape) / elements for direction in DIRECTIONS)
    flushed = torch.maximum(counters[0, 1].double() * row, counters[1, 1].double() * column)
    return {"saturated_fraction": counters[:, 0].amax().double() / elements, "flushed_fraction": flushed}


def zero_fraction(dw_NK: Tensor) -> Tensor:
    """The share of a weight gradient's elements that are exactly zero, of either sign.

    Such an element tells its weight nothing: all of its products were zero, or vanished in the format, as where a column of grad_output was
    flushed. Without quantisation hardly any is zero, but for those of a feature that no token used.

    Args:
        dw_NK: any floating dtype, as the GEMM gives it: of one micro-batch, before it is added to those of others and reduced over ranks.

    Returns:
        fp64 scalar on dw's device, unsynchronised. A NaN is not zero.
    """
    return 1 - torch.count_nonzero(dw_NK).double() / dw_NK.numel()


def product_figures(
    a_MK: Tensor,
    b_NK: Tensor,
    a_hat_MK: Tensor,
    b_hat_NK: Tensor,
    *,
    samples: int = SAMPLES,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Tensor]:
    """SNR and correlations of the GEMM a b^T, estimated on the output entries where sampled rows of a and of b meet.

    Rows are drawn with replacement, with a probability proportional to their power, and divided by their norm. This estimates the same
    ratios of sums over all entries as uniform draws would, but a few long rows no longer decide the result.

    The bounds are those of a symmetric 95 % bootstrap-t interval of the logarithm of the ratio behind each figure. Entries that share a
    row of a or of b are not independent: rows of a and rows of b are the clusters, for the standard error as for the bootstrap.
    `tests/bench/interval_coverage.py` measures how often the interval holds the figure of the whole GEMM. Where all rows are taken, the
    figure is exact for this GEMM, and the interval is that for more rows like these.

    Args:
        a_MK, b_NK: the operands before quantisation, any floating dtype, any strides; for wgrad with a Hadamard transform in the rotated
            domain, like their dequantised forms: the transform leaves dot products as they are, but not their terms.
        a_hat_MK, b_hat_NK: the same, dequantised.
        samples: rows drawn from a and from b; all of them, once each, where there are no more.
        resamples: of the bootstrap.
        seed: of the sample and of the bootstrap; the same seed gives the same result on the same kind of device.

    Returns:
        fp64 scalars on a's device, unsynchronised: product_snr_db, dot_snr_db, signal_correlation, noise_correlation, each also with
        `_lower` and `_upper`. Operands that are exact have infinite SNRs and no noise correlation (NaN).

    Source: two-way clusters: Owen, Annals of Applied Statistics 1 (2007), section 3, and Cameron, Gelbach and Miller, Journal of Business
        and Economic Statistics 29 (2011). Symmetric bootstrap-t: Hall, Journal of the Royal Statistical Society B 50 (1988).
    """
    generator = torch.Generator(a_MK.device).manual_seed(seed)
    a, b = (_drawn(matrix, samples, generator) for matrix in (a_MK, b_NK))
    exact, quantised = (_rows(a_MK, a), _rows(b_NK, b)), (_rows(a_hat_MK, a), _rows(b_hat_NK, b))
    return _figures_of_rows((a, b), exact, quantised, resamples, generator)


def _drawn(matrix: Tensor, samples: int, generator: torch.Generator) -> Draw:
    """Rows drawn by their power.

    All rows, in order and undivided, where there are no more than `samples`. A matrix of zeros or NaN may give any row.
    """
    count, device = matrix.size(0), matrix.device
    if count <= samples:
        return Draw(torch.arange(count, device=device), torch.ones(count, 1, dtype=torch.float64, device=device))
    norms = torch.cat([chunk.double().norm(dim=1) for chunk in matrix.split(max(1, _CHUNK_ELEMENTS // max(1, matrix.size(1))))])
    powers = norms.square()
    # by the inverse distribution function: torch.multinomial refuses zeros and NaN; in integers, whose cumulative sum is deterministic
    cumulative = (powers / powers.sum() * 2.0**52).long().cumsum(dim=0)
    uniform = torch.rand(samples, dtype=torch.float64, device=device, generator=generator)
    rows = torch.searchsorted(cumulative, (uniform * cumulative[-1]).long(), right=True).clamp(max=count - 1)
    return Draw(rows, norms[rows].unsqueeze(1))


def _figures_of_rows(
    draws: tuple[Draw, Draw],
    exact: tuple[Tensor, Tensor],
    quantised: tuple[Tensor, Tensor],
    resamples: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """`product_figures` of the drawn rows of (a, b), not yet divided by their norms."""
    log_ratios, margins = _intervals(powers_of_rows(draws, exact, quantised), resamples, generator)
    bounds = {"": log_ratios, "_lower": log_ratios - margins, "_upper": log_ratios + margins}
    named = {suffix: _figures_of(values, exact[0].size(1)) for suffix, values in bounds.items()}
    return {figure + suffix: values[i] for i, figure in enumerate(PRODUCT_FIGURES) for suffix, values in named.items()}


def powers_of_rows(draws: tuple[Draw, Draw], exact: tuple[Tensor, Tensor], quantised: tuple[Tensor, Tensor]) -> Tensor:
    """fp64 [4, M, N]: s^2, r^2, sum_k z_k^2, sum_k e_k^2 of each output entry where drawn rows of (a, b) meet, divided by their norms."""
    a, b = (rows.double() / draw.norms for rows, draw in zip(exact, draws, strict=True))
    a_hat, b_hat = (rows.double() / draw.norms for rows, draw in zip(quantised, draws, strict=True))
    return _powers(a, b, a_hat, b_hat)


def _powers(a: Tensor, b: Tensor, a_hat: Tensor, b_hat: Tensor) -> Tensor:
    """fp64 [4, M, N]: s^2, r^2, sum_k z_k^2, sum_k e_k^2 of each output entry.

    e_k = a db + da b_hat with the operands' errors da, db, expanded so that no large terms cancel and exact operands give exact zeros.
    """
    da, db = a_hat - a, b_hat - b
    signal, noise = a @ b.t(), a @ db.t() + da @ b_hat.t()
    signal_terms = a.square() @ b.square().t()
    noise_terms = a.square() @ db.square().t() + 2 * (a * da) @ (db * b_hat).t() + da.square() @ b_hat.square().t()
    return torch.stack([signal.square(), noise.square(), signal_terms, noise_terms])


def _figures_of(log_ratios: Tensor, reduction: int) -> Tensor:
    """[4] figures, in the order of PRODUCT_FIGURES, of the logarithms of their ratios of powers."""
    return torch.cat([log_ratios[:2] * (10 / math.log(10)), log_ratios[2:].expm1() / (reduction - 1)])


def _ratios(powers: Tensor) -> tuple[Tensor, Tensor]:
    """Dividends and divisors of the ratios behind PRODUCT_FIGURES, [4, ...] of [4, ...]."""
    signal, noise, signal_terms, noise_terms = powers
    return torch.stack([signal_terms, signal, signal, noise]), torch.stack([noise_terms, noise, signal_terms, noise_terms])


def _intervals(powers: Tensor, resamples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Log ratios [4] behind the figures, and the half-widths [4] of their intervals.

    Where there is no spread, or no ratio, the width is zero; where there is one row or column, or resamples often lack one side of a ratio,
    it is infinite.
    """
    means = powers.mean(dim=(1, 2), keepdim=True)
    dividends, divisors = _ratios(means.flatten())
    above, below = _ratios(powers / means)  # of the size of 1, so that squares stay in range
    equal = (powers.new_full((count, 1), 1 / count) for count in powers.shape[1:])
    _, error = _log_ratios(above, below, *equal)
    error = torch.where(error < _NO_SPREAD, 0.0, error)
    drawn = (_resampled(count, resamples, generator).t() / count for count in powers.shape[1:])
    deviations, errors = _log_ratios(above, below, *drawn)
    ordered = (deviations / errors).abs().nan_to_num(nan=math.inf, posinf=math.inf).sort(dim=1).values
    quantile = ordered[:, min(resamples, math.ceil(CONFIDENCE * (resamples + 1))) - 1]
    margins = (quantile * error.squeeze(1)).nan_to_num(nan=0.0, posinf=math.inf)
    return (dividends / divisors).log(), margins if min(powers.shape[1:]) > 1 else torch.full_like(margins, math.inf)


def _log_ratios(above: Tensor, below: Tensor, row_weights: Tensor, column_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the ratio of weighted means over entries, and its standard error from rows and columns as clusters.

    To first order the logarithm is the mean over entries of g_ij = above_ij / mean - below_ij / mean. The variance of that mean is the one
    between rows, plus the one between columns, minus the one of single entries, which both contain; and never below the last.

    Args:
        above, below: [4, M, N].
        row_weights, column_weights: [M, R] and [N, R], each column of sum 1.

    Returns:
        [4, R] and [4, R].
    """
    rows, columns = above.shape[1:]
    sides, products = torch.stack([above, below]), torch.stack([above.square(), above * below, below.square()])
    by_row, by_column = sides @ column_weights, sides.mT @ row_weights
    means = (by_row * row_weights).sum(dim=-2, keepdim=True)
    up, down = means.squeeze(-2)
    above_square, product, below_square = (products @ column_weights * row_weights).sum(dim=-2)
    squares = above_square / up.square() - 2 * product / (up * down) + below_square / down.square()
    between_rows, between_columns = (
        ((part[0] / means[0] - part[1] / means[1]).square() * weights).sum(dim=-2)
        for part, weights in ((by_row, row_weights), (by_column, column_weights))
    )
    of_entries = (squares - between_rows - between_columns) / ((rows - 1) * (columns - 1))
    variance = between_rows / (rows - 1) + between_columns / (columns - 1) - of_entries
    return up.log() - down.log(), torch.maximum(variance, of_entries).clamp(min=0).sqrt()


def _resampled(count: int, resamples: int, generator: torch.Generator) -> Tensor:
    """fp64 [resamples, count]: how often each of `count` rows is drawn by `count` draws with replacement."""
    draws = torch.randint(count, (resamples, count), generator=generator, device=generator.device)
    places = draws + count * torch.arange(resamples, device=draws.device).unsqueeze(1)
    counts = torch.zeros(draws.numel(), dtype=torch.float64, device=draws.device)
    return counts.scatter_add_(0, places.flatten(), torch.ones_like(counts)).view(resamples, count)


def _decibel(ratio: Tensor) -> Tensor:
    return 10 * ratio.log10()


def _scaled(values: Tensor, factor: Tensor | None) -> Tensor:
    return values if factor is None else values * factor


class GemmWatch:
    """Takes the figures of the three GEMMs of one linear layer, during one forward and one backward pass.

    fprop y = x w^T, dgrad dx = dy w, wgrad dw = dy^T x. For wgrad a sample of x's columns, in the rotated domain where the recipe has a
    Hadamard transform, is kept from the forward to the backward pass; everything else is reduced to scalars at once, and no scalar is read.

    Args:
        recipe: of the linear.
        samples, resamples, seed: as in `product_figures`.

    Attributes:
        figures: fp64 scalars on the device by `<input|weight|grad_output>/<figure>` and `<fprop|dgrad|wgrad>/<figure>`. Operand errors are
            those of the rowwise direction. wgrad also has zero_fraction, where `weight_gradient` was called.
    """

    def __init__(self, recipe: Recipe, samples: int = SAMPLES, resamples: int = RESAMPLES, seed: int = 0):
        self.specs = recipe.operands
        self.samples, self.resamples, self.seed = samples, resamples, seed
        self.figures: dict[str, Tensor] = {}
        self._counters: dict[str, Tensor] = {}
        self._x_columns: Tensor | None = None
        self._x_draw: Draw | None = None

    def counters(self, operand: str, device: torch.device) -> Tensor:
        """int64 [2, 2] for the `counters` of every quantisation of this operand: input | weight | grad_output.

        Without this call the operand has no saturated and flushed fractions.
        """
        return self._counters.setdefault(operand, torch.zeros(2, 2, dtype=torch.int64, device=device))

    @torch.no_grad()
    def forward(self, x_MK: Tensor, w_NK: Tensor, x_row: Operand, w_row: Operand) -> None:
        """Figures of input, weight and fprop; the tensors are those of this rank's GEMM."""
        self._generator = torch.Generator(x_MK.device).manual_seed(self.seed)
        self._operand("input", x_MK, x_row)
        self._operand("weight", w_NK, w_row)
        x, w = self._draw(x_MK), self._draw(w_NK)
        self._gemm("fprop", (x, w), (_rows(x_MK, x), _rows(w_NK, w)), (_rows(x_row, x), _rows(w_row, w)))
        self._x_draw = self._draw(x_MK.t())
        self._x_columns = random_hadamard_transform(_columns(x_MK, self._x_draw), self.specs["input"].columnwise.rht)

    @torch.no_grad()
    def backward(self, dy_MN: Tensor, w_NK: Tensor, dy_row: Operand, w_col: Operand, dy_col: Operand, x_col: Operand) -> None:
        """Figures of grad_output, dgrad and wgrad, after `forward`. dy_col and x_col are [M, N] and [M, K], never transposed."""
        self._operand("grad_output", dy_MN, dy_row)
        dy, w = self._draw(dy_MN), self._draw(w_NK.t())
        self._gemm("dgrad", (dy, w), (_rows(dy_MN, dy), _columns(w_NK, w)), (_rows(dy_row, dy), _columns(w_col, w)))
        dy, x = self._draw(dy_MN.t()), self._x_draw  # the transform leaves norms as they are
        dy_columns = random_hadamard_transform(_columns(dy_MN, dy), self.specs["grad_output"].columnwise.rht)
        self._gemm("wgrad", (dy, x), (dy_columns, self._x_columns), (_columns(dy_col, dy), _columns(x_col, x)))
        self._x_columns = self._x_draw = None
        elements = {"input": x_col.values.numel(), "weight": w_NK.numel(), "grad_output": dy_MN.numel()}
        for operand, counters in self._counters.items():
            self._add(operand, clipping_figures(counters, elements[operand], self.specs[operand]))

    @torch.no_grad()
    def weight_gradient(self, dw_NK: Tensor) -> None:
        """What wgrad gave on this rank, in the dtype that gradients are accumulated in."""
        self._add("wgrad", {"zero_fraction": zero_fraction(dw_NK)})

    def _operand(self, name: str, x: Tensor, quantised: Operand) -> None:
        self._add(name, operand_figures(x, quantised.values, quantised.decode_factor))

    def _draw(self, matrix: Tensor) -> Draw:
        return _drawn(matrix, self.samples, self._generator)

    def _gemm(self, name: str, draws: tuple[Draw, Draw], exact: tuple[Tensor, Tensor], quantised: tuple[Tensor, Tensor]) -> None:
        self._add(name, self.gemm_figures(draws, exact, quantised))

    def gemm_figures(
        self, draws: tuple[Draw, Draw], exact: tuple[Tensor, Tensor], quantised: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """What is told of a GEMM by drawn rows of its two operands, not yet divided by their norms."""
        return _figures_of_rows(draws, exact, quantised, self.resamples, self._generator)

    def _add(self, name: str, figures: dict[str, Tensor]) -> None:
        self.figures |= {f"{name}/{figure}": value for figure, value in figures.items()}


def _rows(x: Tensor | Operand, draw: Draw) -> Tensor:
    """[samples, columns]: drawn rows, of an Operand with its global scale."""
    if not isinstance(x, Tensor):
        return _scaled(_rows(x.values, draw).double(), x.decode_factor)
    return x.index_select(0, draw.rows)


def _columns(x: Tensor | Operand, draw: Draw) -> Tensor:
    """[samples, rows]: as `_rows`, of the transpose."""
    if not isinstance(x, Tensor):
        return _scaled(_columns(x.values, draw).double(), x.decode_factor)
    return _rows(x.t(), draw)
