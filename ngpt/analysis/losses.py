"""The figures of the loss: in full, its end, over time, and other groups relative to the first."""

import math
from collections.abc import Iterable, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ngpt.analysis import drawing, figures, formats
from ngpt.analysis.drawing import Curve
from ngpt.analysis.figures import Lines
from ngpt.analysis.groups import Group, Series, differ_in_text, difference
from ngpt.analysis.sheets import Sheet

_KEYS = ("train_loss", "val_loss")
_SPLITS = {"train_loss": "train", "val_loss": "valid"}  # whose text a loss is of
_TRAINING = {"linewidth": 1.3}
_BACKGROUND = {"linewidth": 0.9, "alpha": 0.45}  # training loss beside a validation loss, in a narrow frame
_VALIDATION = {"linewidth": 1.8, "marker": "o", "markersize": 4, "markeredgecolor": drawing.PAPER, "markeredgewidth": 0.6, "zorder": 3}
_RING = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "markeredgecolor": drawing.TEXT, "linestyle": "none", "zorder": 4}
_FEWEST = 20  # fewest records for a second figure of the later half


def sheets_of(groups: Sequence[Group]) -> list[Sheet]:
    """The sheets for which there is data. Differences need a second group that shares texts and token counts with the first."""
    found = [figures.sheet(lines, groups) for lines in _FIGURES if lines.file != "loss_end" or _is_long(groups)]
    return [sheet for sheet in found if sheet] + [sheet for relative in (False, True) if (sheet := _difference_sheet(groups, relative))]


def _is_long(groups: Sequence[Group]) -> bool:
    return any(len(group.series("train_loss")) >= _FEWEST for group in groups)


def _loss(axes: Axes, curves: list[Curve]) -> Iterable[Artist]:
    for curve in curves:
        curve.line(axes, "train_loss", **_TRAINING)
        curve.line(axes, "val_loss", **_VALIDATION)
    drawing.log_axis(axes, least=1.01)
    return [*_styles(curves), *_mark_broken(axes, curves), *_mark_lowest(axes, curves)]


def _loss_end(axes: Axes, curves: list[Curve]) -> Iterable[Artist]:
    """As `_loss`, but framed on its later half, on a linear axis."""
    half = max(x for curve in curves for key in _KEYS for x in curve.series(key).x) / 2
    for curve in curves:
        for key, look in (("train_loss", _TRAINING), ("val_loss", _VALIDATION)):
            found = curve.series(key)
            if key == "train_loss" and len(curve.series("val_loss")):
                look = _BACKGROUND
            curve.draw(axes, found.only(index for index, x in enumerate(found.x) if x >= half), **look)
    axes.set_xlim(half, 2.03 * half)
    return [*_styles(curves), *_mark_broken(axes, curves, half), *_mark_lowest(axes, curves, half)]


def _styles(curves: list[Curve]) -> list[Line2D]:
    named = (("training", "train_loss", _TRAINING), ("validation", "val_loss", _VALIDATION))
    return [
        Line2D([], [], color=drawing.GREY, label=label, **look)
        for label, key, look in named
        if any(len(curve.series(key)) for curve in curves)
    ]


def _mark_broken(axes: Axes, curves: list[Curve], start: float = 0.0) -> list[Line2D]:
    """A cross at the top of the frame where a group's training loss first became non-finite, unless that was before `start`."""
    look = {"marker": "x", "markersize": 8, "markeredgewidth": 2, "linestyle": "none"}
    marked = []
    for curve in curves:
        found = curve.series("train_loss")
        bad = [x for x, value in zip(found.x, found.mean, strict=True) if not math.isfinite(value)][:1]
        if bad and bad[0] >= start:
            axes.plot(bad, [0.97], color=curve.color, transform=axes.get_xaxis_transform(), **look)
            marked = [Line2D([], [], color=drawing.GREY, label="first not finite", **look)]
    return marked


def _mark_lowest(axes: Axes, curves: list[Curve], start: float = 0.0) -> list[Line2D]:
    """A ring around the lowest validation loss of all groups, with its value in the legend; nothing if it was before `start`."""
    points = [
        (mean, x)
        for curve in curves
        for x, mean in zip(curve.series("val_loss").x, curve.series("val_loss").mean, strict=True)
        if math.isfinite(mean)
    ]
    lowest, x = min(points, default=(0.0, -1.0))
    if x < start:
        return []
    axes.plot([x], [lowest], **_RING)
    return [Line2D([], [], label=f"lowest validation {lowest:.4f}", **_RING | {"markersize": 7})]


def _difference_sheet(groups: Sequence[Group], relative: bool) -> Sheet | None:
    base = groups[0]
    curves = [curve for curve in drawing.over_tokens(groups)[1:] if any(len(_difference(curve.group, base, key)) for key in _KEYS)]
    if not curves:
        return None

    def draw(axes: Axes, curves: list[Curve]) -> Iterable[Artist]:
        axes.axhline(0, color=drawing.COLORS[0], linewidth=1.2)
        for curve in curves:
            training, validation = (_difference(curve.group, base, key, relative) for key in _KEYS)
            curve.draw(axes, training, **(_BACKGROUND if len(validation) else _TRAINING))
            curve.draw(axes, validation, **_VALIDATION)
        _frame(axes, [_difference(curve.group, base, key, relative) for curve in curves for key in _KEYS])
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
        zero = Line2D([], [], color=drawing.COLORS[0], linewidth=1.2, label=f"0: {formats.short(base.label)}")
        return [zero, *_styles(curves)]

    title, y_label = ("Relative loss difference", "difference (%)") if relative else ("Loss difference", "difference (nats per token)")
    caption = f"Less {base.label}{', over its loss' if relative else ''}, at the token counts that both logged. Below zero is better. "
    caption += "The first tenth may leave the frame."
    if len(base.runs) > 1:
        caption += f" Of {base.name} the mean over its seeds is taken."
    name = "loss_relative" if relative else "loss_difference"
    return Sheet(name, f"{title} from {base.label}", caption, "Loss", (figures.panel(curves, y_label, draw),))


def _difference(group: Group, base: Group, key: str, relative: bool = False) -> Series:
    """`difference` of losses on the same text; of others, which cannot be compared, no point."""
    if differ_in_text((*group.runs, *base.runs), _SPLITS[key]):
        return Series([], [], [], [])
    return difference(group, base, key, relative)


def _frame(axes: Axes, found: Sequence[Series]) -> None:
    """The frame for what follows the first tenth of the tokens, where losses differ for no lasting reason."""
    points = [(x, y) for series in found for x, *ys in zip(series.x, series.low, series.high, strict=True) for y in ys if math.isfinite(y)]
    end = max((x for x, _ in points), default=0.0)
    later = [y for x, y in points if x >= 0.1 * end] or [0.0]
    low, high = min(*later, 0.0), max(*later, 0.0)
    margin = 0.06 * (high - low) or 1e-3
    axes.set_ylim(low - margin, high + margin)


_FIGURES = (
    Lines(
        "loss_tokens",
        "Loss over tokens",
        "loss (nats per token)",
        _KEYS,
        _loss,
        "From the first logged step, on a logarithmic axis.",
        "Loss",
    ),
    Lines(
        "loss_end",
        "Loss over the later half",
        "loss (nats per token)",
        _KEYS,
        _loss_end,
        "The same from half of the tokens on, on a linear axis.",
        "Loss",
    ),
)
LOSS_OVER_TIME = Lines(
    "loss_time",
    "Loss over training time",
    "loss (nats per token)",
    _KEYS,
    _loss,
    "Time is the sum of the step times: start-up, validation and saving are left out.",
    "Training",
    over_time=True,
)
