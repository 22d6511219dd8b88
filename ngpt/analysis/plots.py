"""The figures of a report: one PNG a concern, several runs overlaid."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from ngpt.analysis import drawing, formats, layer_panels
from ngpt.analysis.compare import Run
from ngpt.analysis.drawing import Curve

_SCALES = {
    "attn_alpha": "attn_alpha: attention step",
    "mlp_alpha": "mlp_alpha: MLP step",
    "mixer_alpha": "mixer_alpha: mixer step",
    "sqk": "sqk: queries and keys",
    "suv": "suv: MLP pre-activation",
    "mixer_in_scale": "mixer_in_scale: Mamba in_proj output",
    "expert_load": "expert_load: busiest expert over the average one, by layer",
    "sz": "sz: logits",
}
_HIDDEN_NORM = "health/hidden_norm"
_GEMMS = ("fprop", "dgrad", "wgrad")
_OPERANDS = ("input", "weight", "grad_output")


@dataclass(frozen=True)
class Plot:
    """A written figure. `section`: Training | Health | Precision; `wide`: it needs the full width of a page."""

    title: str
    path: Path
    caption: str
    section: str
    wide: bool = False


@dataclass(frozen=True)
class _Figure:
    """A figure of one axes; it is drawn where some run logged one of `keys`."""

    file: str
    title: str
    y_label: str
    keys: tuple[str, ...]
    draw: Callable[[Axes, list[Curve]], None]
    caption: str
    section: str = "Training"
    over_time: bool = False


@dataclass(frozen=True)
class _LayerFigure:
    """A grid of axes with `figure` of every low-precision layer; `parts`: the GEMMs or the operands it is logged for.

    `beside`: another figure of the same parts, drawn with it and less prominently.
    """

    figure: str
    title: str
    y_label: str
    parts: tuple[str, ...]
    caption: str
    beside: str | None = None


def write_plots(runs: Sequence[Run], folder: Path) -> list[Plot]:
    """Draw every figure for which some run has data.

    Args:
        runs: One or more runs; each keeps its colour in all figures.
        folder: An existing folder for the PNGs.

    Returns:
        What was written, in the order of a page.
    """
    with matplotlib.rc_context(drawing.STYLE):
        plots = [_write_figure(figure, runs, folder) for figure in _FIGURES if _has_data(runs, figure)]
        keys = dict.fromkeys(key for run in runs for record in run.metrics for key in record)
        scales = _scales(keys)
        if scales:
            plots.append(_write_scales(scales, runs, folder))
        for figure in _LAYER_FIGURES:
            layers = layer_panels.find_layers(keys, figure.figure, figure.parts)
            if layers:
                plots.append(_write_layers(figure, layers, runs, folder))
    return plots


def _has_data(runs: Sequence[Run], figure: _Figure) -> bool:
    if figure.over_time and not any(run.training_seconds[-1] for run in runs):
        return False
    return any(run.series(key, run.tokens)[0] for run in runs for key in figure.keys)


def _scales(keys: Iterable[str]) -> list[str]:
    """Names of the scales among the logged keys, in the order of the model."""
    found = {key.split("/")[1] for key in keys if key.startswith("health/") and key.endswith("/mean")} - {"hidden_norm"}
    return [name for name in _SCALES if name in found] + sorted(found - set(_SCALES))


def _write_figure(spec: _Figure, runs: Sequence[Run], folder: Path) -> Plot:
    figure = Figure(figsize=(7.2, 3.7), layout="constrained")
    axes = figure.add_subplot(title=spec.title, ylabel=spec.y_label)
    curves, unit = drawing.over_time(runs) if spec.over_time else (drawing.over_tokens(runs), "")
    spec.draw(axes, curves)
    if spec.over_time:
        drawing.time_axis(axes, unit)
    else:
        drawing.token_axis(axes)
    drawing.name_ends(axes, curves, spec.keys)
    path = folder / f"{spec.file}.png"
    figure.savefig(path, dpi=150)
    return Plot(spec.title, path, spec.caption, spec.section)


def _write_scales(scales: list[str], runs: Sequence[Run], folder: Path) -> Plot:
    columns = min(3, len(scales))
    rows = math.ceil(len(scales) / columns)
    figure = Figure(figsize=(12.5, 0.5 + 2.8 * rows), layout="constrained")
    curves = drawing.over_tokens(runs)
    cells = list(figure.subplots(rows, columns, squeeze=False).flat)
    for name, axes in zip(scales, cells, strict=False):
        for curve in curves:
            curve.band(axes, f"health/{name}")
        drawing.token_axis(axes)
        axes.set(title=_SCALES.get(name, name), ylabel="effective value")
    for axes in cells[len(scales) :]:
        axes.remove()
    drawing.name_above(figure, [curve for curve in curves if any(curve.series(f"health/{name}/mean")[0] for name in scales)])
    path = folder / "scales.png"
    figure.savefig(path, dpi=120)
    return Plot("Learned scales", path, "Line: mean; band: minimum to maximum, over layers and channels.", "Health", wide=True)


def _write_layers(spec: _LayerFigure, layers: layer_panels.Grid, runs: Sequence[Run], folder: Path) -> Plot:
    path = folder / f"{spec.figure}.png"
    figure = layer_panels.draw_layers(runs, layers, spec.parts, spec.figure, spec.beside, spec.y_label)
    figure.savefig(path, dpi=120)
    shown = "One line a layer." if len(runs) == 1 else "Line: mean over layers; band: minimum to maximum."
    return Plot(spec.title, path, f"{spec.caption} {shown}", "Precision", wide=True)


def _loss(axes: Axes, curves: list[Curve]) -> None:
    for curve in curves:
        curve.line(axes, "train_loss", alpha=0.55, linewidth=0.9)
        curve.line(axes, "val_loss", marker="o", markersize=3.5, linewidth=1.8)
        first_bad = [x for x, value in zip(*curve.series("train_loss"), strict=True) if not math.isfinite(value)][:1]
        axes.plot(first_bad, [0.97] * len(first_bad), "x", color=curve.color, markersize=8, transform=axes.get_xaxis_transform())
    ceiling = _loss_ceiling(curves)
    if ceiling is not None:
        axes.set_ylim(top=ceiling)
    styles = {"training": {"linewidth": 0.9}, "validation": {"linewidth": 1.8, "marker": "o", "markersize": 3.5}}
    axes.legend(handles=[Line2D([], [], color=drawing.GREY, label=label, **style) for label, style in styles.items()], frameon=False)


def _loss_ceiling(curves: list[Curve]) -> float | None:
    """Where to cut the losses off so that what follows the first 5 % of the longest run fills the frame. None: no need."""
    series = [curve.series(key) for curve in curves for key in ("train_loss", "val_loss")]
    points = [(x, y) for xs, ys in series for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    end = max((x for x, _ in points), default=0.0)
    later = [y for x, y in points if x >= 0.05 * end]
    if not later or max(y for _, y in points) <= max(later):
        return None
    return max(later) + 0.05 * (max(later) - min(later))


def _learning_rate(axes: Axes, curves: list[Curve]) -> None:
    for curve in curves:
        curve.line(axes, "learning_rate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _grad_norm(axes: Axes, curves: list[Curve]) -> None:
    drawing.log_axis(axes)
    for curve in curves:
        curve.line(axes, "grad_norm", linewidth=0.9)
    drawing.reference(axes, curves, "optim.clip_grad", "clipped above")


def _throughput(axes: Axes, curves: list[Curve]) -> None:
    for curve in curves:
        curve.line(axes, "tokens_per_second", linewidth=0.9)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(value)))


def _deviation(axes: Axes, curves: list[Curve]) -> None:
    drawing.log_axis(axes)
    for curve in curves:
        x, y = curve.series("worst_norm_deviation")
        y = [drawing.SMALLEST if value == 0 else value for value in y]
        axes.plot(x, y, color=curve.color, linestyle=curve.style, linewidth=1, marker=".", markersize=3)
    drawing.reference(axes, curves, "debug.norm_tolerance", "limit")


def _hidden_norm(axes: Axes, curves: list[Curve]) -> None:
    for curve in curves:
        curve.band(axes, _HIDDEN_NORM)
    parts = [f"{_HIDDEN_NORM}/{part}" for part in ("min", "mean", "max")]
    values = [value for curve in curves for part in parts for value in curve.series(part)[1] if math.isfinite(value)]
    low, high = min(values, default=1.0), max(values, default=1.0)
    if 0 < 30 * low < high:
        drawing.log_axis(axes)
    elif high - low < 0.01:
        # unit norms differ by rounding alone: a frame that narrow would show nothing else
        axes.set_ylim(low - 0.01, high + 0.01)


_LOSS = {"y_label": "loss (nats per token)", "keys": ("train_loss", "val_loss"), "draw": _loss}
_FIGURES = (
    _Figure(
        "loss_tokens",
        "Loss over tokens",
        caption="The first 5 % may leave the frame at the top. A cross at the top: the first training loss that was not finite.",
        **_LOSS,
    ),
    _Figure(
        "loss_time",
        "Loss over training time",
        caption="Time is the sum of the step times: start-up, validation and saving are left out.",
        over_time=True,
        **_LOSS,
    ),
    _Figure("learning_rate", "Learning rate", "learning rate", ("learning_rate",), _learning_rate, "The schedule as it was applied."),
    _Figure("grad_norm", "Gradient norm", "L2 norm", ("grad_norm",), _grad_norm, "Norm over all parameters, before clipping."),
    _Figure("throughput", "Throughput", "tokens per second", ("tokens_per_second",), _throughput, "The whole job, all devices together."),
    _Figure(
        "norm_deviation",
        "Worst unit-norm deviation",
        "largest | ‖w‖ − 1 |",
        ("worst_norm_deviation",),
        _deviation,
        "Over all normalised weights, on their fp32 masters.",
        "Health",
    ),
    _Figure(
        "hidden_norm",
        "Hidden-state norm",
        "L2 norm",
        (f"{_HIDDEN_NORM}/mean",),
        _hidden_norm,
        "Line: mean; band: minimum to maximum.",
        "Health",
    ),
)
_LAYER_FIGURES = (
    _LayerFigure(
        "dot_snr_db",
        "Signal-to-noise ratio of dot products",
        "dot-product SNR (dB)",
        _GEMMS,
        "Power of the exact dot products of each matrix product over the power of their quantisation errors.",
    ),
    _LayerFigure(
        "relative_error",
        "Relative quantisation error of operands",
        "relative error",
        _OPERANDS,
        "‖quantised − exact‖ / ‖exact‖ of each operand, quantised along its rows.",
    ),
    _LayerFigure(
        "signal_correlation",
        "Correlation of product terms and of their errors",
        "mean correlation",
        _GEMMS,
        "Mean over the pairs of terms of a dot product; grey or dotted: of their errors. Terms above zero add up coherently, "
        "errors near zero average out.",
        beside="noise_correlation",
    ),
)
