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

import torch
from torch import Tensor

from ngpt.precision.hadamard import random_hadamard_transform
from ngpt.precision.recipe import Recipe
from ngpt.precision.tensor import BlockShape, Operand

SAMPLES = 64
RESAMPLES = 200
CONFIDENCE = 0.95
PRODUCT_FIGURES = ("product_snr_db", "dot_snr_db", "signal_correlation", "noise_correlation")
_CHUNK_ELEMENTS = 2**22  # of a tensor in fp64 at a time: 32 MiB


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


def clipping_figures(counters: Tensor, elements: int, block_shape: BlockShape) -> dict[str, Tensor]:
    """Shares of an operand that its quantisers clipped or lost; of its two directions, the worse.

    Args:
        counters: int64 [2, 2], (rowwise, columnwise) by (elements beyond the global amax, nonzero blocks whose scale rounded to zero).
        elements: of the tensor.
        block_shape: of its quantiser.

    Returns:
        fp64 scalars saturated_fraction (of elements) and flushed_fraction (of blocks).
    """
    saturated, flushed = counters.amax(dim=0).double()
    height, width = block_shape
    return {"saturated_fraction": saturated / elements, "flushed_fraction": flushed * (height * width / elements)}


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

    The bounds are those of a 95 % percentile bootstrap. Entries that share a row of a or of b are not independent, so rows of a and rows
    of b are resampled, each with replacement, never single entries. Where rows carry most of the variation the interval is as wide as it
    should be; where entries are as good as independent it is up to 1.7 times too wide. Resampling entries is too narrow in the former case.

    Args:
        a_MK, b_NK: the operands before quantisation, any floating dtype, any strides; for wgrad with a Hadamard transform in the rotated
            domain, like their dequantised forms: the transform leaves dot products as they are, but not their terms.
        a_hat_MK, b_hat_NK: the same, dequantised.
        samples: rows taken at random, without replacement, from a and from b; all of them where there are no more.
        resamples: of the bootstrap.
        seed: of the sample and of the bootstrap; the same seed gives the same result on the same kind of device.

    Returns:
        fp64 scalars on a's device, unsynchronised: product_snr_db, dot_snr_db, signal_correlation, noise_correlation, each also with
        `_lower` and `_upper`. Operands that are exact have infinite SNRs and no noise correlation (NaN).

    Source: pigeonhole bootstrap, Owen, Annals of Applied Statistics 1 (2007), section 3.
    """
    generator = torch.Generator(a_MK.device).manual_seed(seed)
    rows, columns = (_sampled(matrix, samples, generator) for matrix in (a_MK, b_NK))
    a, a_hat = (matrix.index_select(0, rows).double() for matrix in (a_MK, a_hat_MK))
    b, b_hat = (matrix.index_select(0, columns).double() for matrix in (b_NK, b_hat_NK))
    powers = _powers(a, b, a_hat, b_hat)
    point = _figures_of(powers.mean(dim=(1, 2)), a.size(1))
    counts = (_resampled(count, resamples, generator) for count in powers.shape[1:])
    resampled = _figures_of(torch.einsum("pij,ri,rj->pr", powers, *counts), a.size(1))
    ordered = resampled.sort(dim=1).values
    tail = (1 - CONFIDENCE) / 2 * (resamples - 1)
    lower, upper = ordered[:, round(tail)], ordered[:, round(resamples - 1 - tail)]
    named = {"": point, "_lower": lower, "_upper": upper}
    return {figure + suffix: values[i] for i, figure in enumerate(PRODUCT_FIGURES) for suffix, values in named.items()}


def _sampled(matrix: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Indices of sampled rows; all rows, in order, where there are no more than `samples`."""
    if matrix.size(0) <= samples:
        return torch.arange(matrix.size(0), device=matrix.device)
    return torch.randperm(matrix.size(0), generator=generator, device=matrix.device)[:samples]


def _powers(a: Tensor, b: Tensor, a_hat: Tensor, b_hat: Tensor) -> Tensor:
    """fp64 [4, M, N]: s^2, r^2, sum_k z_k^2, sum_k e_k^2 of each output entry.

    e_k = a db + da b_hat with the operands' errors da, db, expanded so that no large terms cancel and exact operands give exact zeros.
    """
    da, db = a_hat - a, b_hat - b
    signal, noise = a @ b.t(), a @ db.t() + da @ b_hat.t()
    signal_terms = a.square() @ b.square().t()
    noise_terms = a.square() @ db.square().t() + 2 * (a * da) @ (db * b_hat).t() + da.square() @ b_hat.square().t()
    return torch.stack([signal.square(), noise.square(), signal_terms, noise_terms])


def _figures_of(powers: Tensor, reduction: int) -> Tensor:
    """[4, ...] figures, in the order of PRODUCT_FIGURES, of [4, ...] powers summed over output entries."""
    signal, noise, signal_terms, noise_terms = powers
    return torch.stack(
        [
            _decibel(signal_terms / noise_terms),
            _decibel(signal / noise),
            (signal / signal_terms - 1) / (reduction - 1),
            (noise / noise_terms - 1) / (reduction - 1),
        ]
    )


def _resampled(count: int, resamples: int, generator: torch.Generator) -> Tensor:
    """fp64 [resamples, count]: how often each of `count` rows is drawn by `count` draws with replacement."""
    draws = torch.randint(count, (resamples, count), generator=generator, device=generator.device)
    return (draws.unsqueeze(-1) == torch.arange(count, device=generator.device)).sum(dim=1).double()


def _decibel(ratio: Tensor) -> Tensor:
    return 10 * ratio.log10()


def _scaled(values: Tensor, factor: Tensor | None) -> Tensor:
    return values if factor is None else values * factor


class GemmWatch:
    """Takes the figures of the three GEMMs of one linear layer, during one forward and one backward pass.

    fprop y = x w^T, dgrad dx = dy w, wgrad dw = dy^T x. For wgrad a sample of x's columns, in the rotated domain where the recipe has a
    Hadamard transform, is kept from the forward to the backward pass; everything else is reduced to scalars at once, and none is read.

    Args:
        recipe: of the run.
        samples, resamples, seed: as in `product_figures`. All layers and steps share the seed, so the same features are watched throughout.

    Attributes:
        figures: fp64 scalars on the device by `<input|weight|grad_output>/<figure>` and `<fprop|dgrad|wgrad>/<figure>`. Operand errors are
            those of the rowwise direction.
    """

    def __init__(self, recipe: Recipe, samples: int = SAMPLES, resamples: int = RESAMPLES, seed: int = 0):
        self.specs = {"input": recipe.input, "weight": recipe.weight, "grad_output": recipe.grad_output}
        self.samples, self.resamples, self.seed = samples, resamples, seed
        self.figures: dict[str, Tensor] = {}
        self._counters: dict[str, Tensor] = {}
        self._x_columns: Tensor | None = None

    def counters(self, operand: str, device: torch.device) -> Tensor:
        """int64 [2, 2] for the `counters` of every quantisation of this operand: input | weight | grad_output.

        Without this call the operand has no saturated and flushed fractions.
        """
        return self._counters.setdefault(operand, torch.zeros(2, 2, dtype=torch.int64, device=device))

    @torch.no_grad()
    def forward(self, x_MK: Tensor, w_NK: Tensor, x_row: Operand, w_row: Operand) -> None:
        """Figures of input, weight and fprop; the tensors are those of this rank's GEMM."""
        self._operand("input", x_MK, x_row)
        self._operand("weight", w_NK, w_row)
        self._gemm("fprop", (self._rows(x_MK), self._rows(w_NK)), (self._rows(x_row), self._rows(w_row)))
        self._x_columns = random_hadamard_transform(self._columns(x_MK), self.specs["input"].rht)

    @torch.no_grad()
    def backward(self, dy_MN: Tensor, w_NK: Tensor, dy_row: Operand, w_col: Operand, dy_col: Operand, x_col: Operand) -> None:
        """Figures of grad_output, dgrad and wgrad, after `forward`. dy_col and x_col are [M, N] and [M, K], never transposed."""
        self._operand("grad_output", dy_MN, dy_row)
        self._gemm("dgrad", (self._rows(dy_MN), self._columns(w_NK)), (self._rows(dy_row), self._columns(w_col)))
        dy_columns = random_hadamard_transform(self._columns(dy_MN), self.specs["grad_output"].rht)
        self._gemm("wgrad", (dy_columns, self._x_columns), (self._columns(dy_col), self._columns(x_col)))
        self._x_columns = None
        elements = {"input": x_col.values.numel(), "weight": w_NK.numel(), "grad_output": dy_MN.numel()}
        for operand, counters in self._counters.items():
            self._add(operand, clipping_figures(counters, elements[operand], self.specs[operand].block_shape))

    def _operand(self, name: str, x: Tensor, quantised: Operand) -> None:
        self._add(name, operand_figures(x, quantised.values, quantised.decode_factor))

    def _gemm(self, name: str, exact: tuple[Tensor, Tensor], quantised: tuple[Tensor, Tensor]) -> None:
        self._add(name, product_figures(*exact, *quantised, samples=self.samples, resamples=self.resamples, seed=self.seed))

    def _add(self, name: str, figures: dict[str, Tensor]) -> None:
        self.figures |= {f"{name}/{figure}": value for figure, value in figures.items()}

    def _rows(self, x: Tensor | Operand) -> Tensor:
        """[samples, columns]: sampled rows, of an Operand with its global scale. Of matrices of equal height always the same rows."""
        if not isinstance(x, Tensor):
            return _scaled(self._rows(x.values).double(), x.decode_factor)
        generator = torch.Generator(x.device).manual_seed(self.seed)
        return x.index_select(0, _sampled(x, self.samples, generator))

    def _columns(self, x: Tensor | Operand) -> Tensor:
        """[samples, rows]: as `_rows`, of the transpose."""
        if not isinstance(x, Tensor):
            return _scaled(self._columns(x.values).double(), x.decode_factor)
        return self._rows(x.t())
