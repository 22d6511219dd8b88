"""The health panel: spikes of the loss, norms as deviations from one, learned scales, and the routers of a mixture of experts."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ngpt.analysis import drawing, figures
from ngpt.analysis.compare import Run
from ngpt.analysis.drawing import Curve
from ngpt.analysis.figures import Lines
from ngpt.analysis.groups import Group, Series
from ngpt.analysis.sheets import Name, Sheet
from ngpt.spikes import loss_spikes

# names of the scales in the metrics, in model order
_SCALES = {
    "attn_alpha": Name("attention step", ("α", "A"), "attn_alpha"),
    "mlp_alpha": Name("MLP step", ("α", "M"), "mlp_alpha"),
    "mixer_alpha": Name("mixer step", ("α", "mixer"), "mixer_alpha"),
    "sqk": Name("queries and keys", ("s", "qk"), "sqk"),
    "suv": Name("MLP pre-activation", ("s", "uv"), "suv"),
    "mixer_in_scale": Name("Mamba in_proj output", ("s", "in"), "mixer_in_scale"),
    "sz": Name("logits", ("s", "z"), "sz"),
}
_HIDDEN, _LOAD = "health/hidden_norm", "health/expert_load"
_NO_SCALES = {"hidden_norm", "expert_load"}


def sheets_of(groups: Sequence[Group], keys: Iterable[str]) -> list[Sheet]:
    """The sheets for which there is data. `keys`: every key that any run logged."""
    # a control's hidden states may have any norm, so a deviation from one would mean nothing
    spheres = [curve for curve in drawing.over_tokens(groups) if curve.group.agreed("model.architecture") != "gpt"]
    others = [curve for curve in drawing.over_tokens(groups) if curve not in spheres]
    with_spikes = [curve for curve in drawing.over_tokens(groups) if any(_finite_spikes(run) for run in curve.group.runs)]
    found = [
        figures.sheet_of_curves(_SPIKES, with_spikes),
        figures.sheet(_DEVIATION, groups),
        figures.sheet_of_curves(_HIDDEN_DEVIATION, spheres),
        figures.sheet_of_curves(_HIDDEN_NORM if spheres else replace(_HIDDEN_NORM, file=_HIDDEN_DEVIATION.file), others),
        _scales_sheet(groups, keys),
        figures.sheet(_EXPERT_LOAD, groups),
        figures.sheet(_BALANCING, groups),
    ]
    return [sheet for sheet in found if sheet]


def _finite_spikes(run: Run) -> list[tuple[float, float]]:
    """(tokens, nats above the running median) of the spikes of a run's training loss, without those that are not finite."""
    tokens, losses = run.series("train_loss", run.tokens)
    return [(tokens[spike.place], spike.height) for spike in loss_spikes(losses) if math.isfinite(spike.height)]


def _spikes(axes: Axes, curves: list[Curve]) -> Iterable[Artist]:
    for curve in curves:
        spikes = [spike for run in curve.group.runs for spike in _finite_spikes(run)]
        axes.plot(*zip(*spikes, strict=True), color=curve.color, linestyle="none", marker="o", markersize=4)
    axes.set_ylim(bottom=0)
    return ()


def _deviation(axes: Axes, curves: list[Curve]) -> Iterable[Artist]:
    for curve in curves:
        curve.draw(axes, _positive(curve.series("worst_norm_deviation")), marker="o", markersize=3)
    drawing.log_axis(axes)
    return drawing.reference(axes, curves, "debug.norm_tolerance", "limit")


def _hidden_deviation(axes: Axes, curves: list[Curve]) -> Iterable[Artist]:
    for curve in curves:
        low, mean, high = (curve.series(f"{_HIDDEN}/{part}") for part in ("min", "mean", "max"))
        worst = Series(high.x, *([max(abs(a - 1), abs(b - 1)) for a, b in zip(low.low, high.high, strict=True)],) * 3)
        curve.draw(axes, _positive(worst), marker="o", markersize=3)
        middle = [abs(value - 1) for value in mean.mean]
        curve.draw(axes, _positive(Series(mean.x, middle, middle, middle)), linewidth=1, linestyle="dotted")
    drawing.log_axis(axes)
    styles = {"farthest token": {"marker": "o", "markersize": 3}, "mean": {"linestyle": "dotted"}}
    return [Line2D([], [], color=drawing.GREY, label=label, **style) for label, style in styles.items()]


def _positive(found: Series) -> Series:
    """The series with exact zeros raised to a value that a logarithmic axis can show."""
    parts = (found.mean, found.low, found.high)
    return Series(found.x, *([drawing.SMALLEST if value == 0 else value for value in values] for values in parts))


def _hidden_norm(axes: Axes, curves: list[Curve]) -> Iterable[Artist]:
    legend = _banded(axes, curves, _HIDDEN, "tokens and layers")
    drawing.log_axis(axes)
    return legend


def _banded(axes: Axes, curves: list[Curve], prefix: str, of: str) -> list[Artist]:
    for curve in curves:
        curve.band(axes, prefix)
    return [Line2D([], [], color=drawing.GREY, label="mean"), Patch(facecolor=drawing.GREY, alpha=0.25, label=f"least to largest of {of}")]


def _expert_load(axes: Axes, curves: list[Curve]) -> Iterable[Artist]:
    legend = _banded(axes, curves, _LOAD, "layers")
    axes.axhline(1, color=drawing.GREY, linestyle=(0, (4, 3)), linewidth=1)
    return [*legend, Line2D([], [], color=drawing.GREY, linestyle=(0, (4, 3)), linewidth=1, label="1: balanced")]


def _balancing(axes: Axes, curves: list[Curve]) -> Iterable[Artist]:
    for curve in curves:
        curve.line(axes, "aux_loss")
    return ()


def _scales_sheet(groups: Sequence[Group], keys: Iterable[str]) -> Sheet | None:
    found = {key.split("/")[1] for key in keys if key.startswith("health/") and key.endswith("/mean")} - _NO_SCALES
    names = [name for name in _SCALES if name in found] + sorted(found - set(_SCALES))
    panels = []
    for name in names:
        curves = [curve for curve in drawing.over_tokens(groups) if len(curve.series(f"health/{name}/mean"))]
        draw = partial(_banded, prefix=f"health/{name}", of="channels")
        panels.append(figures.panel(curves, "effective value", draw, _SCALES.get(name) or Name(name), width=4.4, height=2.7))
    caption = "Line: mean over layers and channels; band: least to largest."
    return Sheet("scales", "Learned scales", caption, "Health", tuple(panels), columns=3) if panels else None


_SPIKES = Lines(
    "loss_spikes",
    "Spikes of the training loss",
    "nats above the median",
    ("train_loss",),
    _spikes,
    "A point a spike: the loss less the median of the 50 records before it. Losses that were not finite are not shown.",
    "Health",
)
_DEVIATION = Lines(
    "norm_deviation",
    "Worst unit-norm deviation of weights",
    "largest | ‖w‖ − 1 |",
    ("worst_norm_deviation",),
    _deviation,
    "Over all normalised weights, on their fp32 masters. The frame is that of the values.",
    "Health",
)
_HIDDEN_DEVIATION = Lines(
    "hidden_norm",
    "Deviation of hidden-state norms",
    "| ‖h‖ − 1 |",
    (f"{_HIDDEN}/mean",),
    _hidden_deviation,
    "Over the outputs of all layers. The mean is | mean ‖h‖ − 1 |.",
    "Health",
)
_HIDDEN_NORM = Lines(
    "hidden_norm_control",
    "Hidden-state norm of controls",
    "‖h‖",
    (f"{_HIDDEN}/mean",),
    _hidden_norm,
    "Over the outputs of all layers. A GPT control does not normalise them.",
    "Health",
)
_EXPERT_LOAD = Lines(
    "expert_load",
    "Load of the busiest expert",
    "busiest / average expert",
    (f"{_LOAD}/mean",),
    _expert_load,
    "Tokens of each layer's busiest expert over those of its average one.",
    "Experts",
)
_BALANCING = Lines(
    "aux_loss",
    "Balancing loss",
    "auxiliary loss",
    ("aux_loss",),
    _balancing,
    "Mean over the expert layers, before its coefficient; 1 is balanced.",
    "Experts",
)
