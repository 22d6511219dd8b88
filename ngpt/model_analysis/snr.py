"""Signal-to-noise ratios and correlations of every block linear in its three GEMMs. Figures: `ngpt.precision.diagnostics`.

Batches are independent: each has sequences of its own, and rows drawn for itself. So the interval of a figure is Student's over batches,
and covers the text as well as the draws. Figures of a kind of linear are averaged over layers within a batch first, since layers see
the same text.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ngpt.hf.modeling_ngpt import NGPTForCausalLM
from ngpt.kernels.nvfp4_quantize import emulate
from ngpt.model_analysis.capture import Call, captured
from ngpt.model_analysis.intervals import Interval, text_interval
from ngpt.model_analysis.linears import Linear, block_linears
from ngpt.model_analysis.quantise import refused
from ngpt.precision.diagnostics import Draw, GemmWatch, powers_of_rows
from ngpt.precision.rounding import operand_seed, stream_seed
from ngpt.recipes import BLOCK, Recipe

GEMMS = ("fprop", "dgrad", "wgrad")
SAMPLES = 128  # rows drawn from each operand
EXPERTS = 4  # drawn from each layer in each batch
# Edges of the histogram of the rows' signal correlations.
EDGES = (-1.0, -0.1, -0.03, -0.01, -0.003, -0.001, 0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
HALVES = ("even", "odd")  # of the batches
TICK = Callable[[int, int], None]

type Figures = dict[str, float]
type Counts = dict[str, list[int]]  # histogram counts by GEMM


class BatchWatch(GemmWatch):
    """Figures of one batch, with the gains from summation and the rows' correlations, but without intervals."""

    def gemm_figures(
        self, draws: tuple[Draw, Draw], exact: tuple[Tensor, Tensor], quantised: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        return figures_of_powers(powers_of_rows(draws, exact, quantised), exact[0].size(1))


def figures_of_powers(powers: Tensor, reduction: int) -> dict[str, Tensor]:
    """The figures of `ngpt.precision.diagnostics`, their gains, and a histogram, from [4, M, N] powers of output entries.

    signal_gain_db = 10 lg (1 + (K - 1) rho(z)), and noise_gain_db is the same for e: how much summation raises either power.
    averaging_gain_db is their difference: the SNR of the dot products over that of the products. row_correlation_counts: a histogram of the
    first operand's rows by their own rho(z), with bins between EDGES.
    """
    signal, noise, signal_terms, noise_terms = powers.mean(dim=(1, 2))
    signal_gain, noise_gain = signal / signal_terms, noise / noise_terms
    by_row = powers.mean(dim=2)
    of_row = (by_row[0] / by_row[2] - 1) / (reduction - 1)
    edges = torch.tensor(EDGES[1:-1], dtype=of_row.dtype, device=of_row.device)
    places = torch.bucketize(of_row[of_row.isfinite()], edges)
    return {
        "product_snr_db": _decibel(signal_terms / noise_terms),
        "dot_snr_db": _decibel(signal / noise),
        "signal_correlation": (signal_gain - 1) / (reduction - 1),
        "noise_correlation": (noise_gain - 1) / (reduction - 1),
        "signal_gain_db": _decibel(signal_gain),
        "noise_gain_db": _decibel(noise_gain),
        "averaging_gain_db": _decibel(signal_gain / noise_gain),
        "reduction": torch.full_like(signal, reduction),
        "row_correlation_counts": torch.bincount(places, minlength=len(EDGES) - 1).double(),
    }


def _decibel(ratio: Tensor) -> Tensor:
    return 10 * ratio.log10()


def snr(
    model: NGPTForCausalLM, ids_NS: Tensor, recipe: Recipe, batch_size: int, seed: int = 0, samples: int = SAMPLES, tick: TICK | None = None
) -> dict[str, Any]:
    """Figures of every block linear under a recipe's quantisers, each with a 95 % interval over batches.

    Args:
        ids_NS: [N, S + 1]; N is a multiple of batch_size. At least 4 batches, so that each half has two.
        batch_size: sequences per GEMM in training.
        seed: for drawing rows and experts, and for stochastic rounding.
        tick: called with the number of batches done, and the total.

    Returns:
        "linears" by name, "kinds" by path within a layer, "all": figures of input, weight, grad_output, fprop, dgrad and wgrad with value,
        lower and upper. GEMMs also have "halves": the same for the even and the odd batches alone, which share no token. Linears also have
        "histogram": counts of rows. "edges": edges of the histograms.

    Raises:
        ConfigError: the recipe's blocks cannot tile a layer's features.
    """
    linears, batches = block_linears(model), ids_NS.split(batch_size)
    found: list[dict[str, Figures]] = []
    counts: dict[str, Counts] = {}
    for number, ids_BS in enumerate(batches):
        of_batch: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
        for calls in captured(model, linears, ids_BS.to(model.device)):
            for call in _watched(calls, seed, number):
                of_batch[call.linear.name].append(_figures(call, recipe, samples, stream_seed(seed, 0, call.linear.name, number, 0)))
        found.append({name: _mean(map(_as_numbers, parts)) for name, parts in of_batch.items()})
        _add_counts(counts, of_batch)
        if tick:
            tick(number + 1, len(batches))
    return _summary(linears, found, counts)


def _watched(calls: Sequence[Call], seed: int, batch: int) -> Iterator[Call]:
    """All calls except experts', of which some are drawn, with equal probability among those that have tokens."""
    by_layer: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        if call.expert is None:
            yield call
        else:
            by_layer[call.linear.name].append(call)
    for name, found in by_layer.items():
        generator = torch.Generator().manual_seed(stream_seed(seed, 1, name, batch, 0))
        for place in torch.randperm(len(found), generator=generator)[:EXPERTS].tolist():
            yield found[place]


@torch.no_grad()
def _figures(call: Call, recipe: Recipe, samples: int, seed: int) -> dict[str, Tensor]:
    """Figures of a linear's three GEMMs. Tokens are padded with zeros to whole blocks, as training pads those of experts."""
    watch = BatchWatch(recipe, samples, seed=seed)
    x_MK, dy_MN, w_NK = _whole_blocks(call.x_MK), _whole_blocks(call.grad_output()), call.weight()
    assert recipe.input is not None and recipe.weight is not None and recipe.grad_output is not None
    try:
        x_row, x_col = emulate(x_MK, recipe.input, seed=operand_seed(seed, "input"))
        w_row, w_col = emulate(w_NK, recipe.weight, seed=operand_seed(seed, "weight"))
        dy_row, dy_col = emulate(dy_MN, recipe.grad_output, seed=operand_seed(seed, "grad_output"))
    except ValueError as error:
        raise refused(call.linear, error) from error
    watch.forward(x_MK, w_NK, x_row, w_row)
    watch.backward(dy_MN, w_NK, dy_row, w_col, dy_col, x_col)
    return watch.figures


def _whole_blocks(x_MK: Tensor) -> Tensor:
    return F.pad(x_MK, (0, 0, 0, -len(x_MK) % BLOCK))


def _as_numbers(figures: dict[str, Tensor]) -> Figures:
    scalars = {name: value for name, value in figures.items() if value.dim() == 0}
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))


def _mean(parts: Iterable[Figures]) -> Figures:
    """The mean of each figure. All parts have the same figures."""
    found = list(parts)
    return {name: statistics.fmean(part[name] for part in found) for name in found[0]}


def _add_counts(counts: dict[str, Counts], of_batch: dict[str, list[dict[str, Tensor]]]) -> None:
    for name, parts in of_batch.items():
        own = counts.setdefault(name, {gemm: [0] * (len(EDGES) - 1) for gemm in GEMMS})
        for gemm in GEMMS:
            added = torch.stack([part[f"{gemm}/row_correlation_counts"] for part in parts]).sum(dim=0).long().tolist()
            own[gemm] = [old + new for old, new in zip(own[gemm], added, strict=True)]


def _summary(linears: Sequence[Linear], found: Sequence[dict[str, Figures]], counts: dict[str, Counts]) -> dict[str, Any]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for linear in linears:
        if any(linear.name in batch for batch in found):
            kinds[linear.path].append(linear.name)
    names = [name for of_kind in kinds.values() for name in of_kind]

    def averaged(of: Sequence[str]) -> dict[str, Any]:
        return _intervals([_mean(own) if (own := [batch[name] for name in of if name in batch]) else {} for batch in found])

    by_name = {linear.name: averaged([linear.name]) for linear in linears if linear.name in names}
    for name, figures in by_name.items():
        for gemm in GEMMS:
            figures[gemm]["histogram"] = counts[name][gemm]
    return {
        "edges": list(EDGES),
        "batches": len(found),
        "linears": by_name,
        "kinds": {path: averaged(of_kind) for path, of_kind in kinds.items()},
        "all": averaged(names),
    }


def _intervals(batches: Sequence[Figures]) -> dict[str, Any]:
    """Figures of a linear or an average, by operand or GEMM, from those of each batch. A batch without tokens for it has no figures."""
    out: dict[str, Any] = defaultdict(dict)
    for path in next(batch for batch in batches if batch):
        group, _, figure = path.partition("/")
        if figure == "reduction":
            out[group][figure] = statistics.fmean(batch[path] for batch in batches if batch)
            continue
        out[group][figure] = _interval(batches, path)
        if group in GEMMS:
            halves = out[group].setdefault("halves", {half: {} for half in HALVES})
            for first, half in enumerate(HALVES):
                halves[half][figure] = _interval(batches[first::2], path)
    return dict(out)


def _interval(batches: Sequence[Figures], path: str) -> Interval:
    return text_interval([batch[path] for batch in batches if batch])
