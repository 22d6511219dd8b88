"""What all figures share: style, colours, axes, names of the runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ngpt.analysis import formats
from ngpt.analysis.compare import Run

# Okabe and Ito's palette, told apart with any common colour blindness, without its yellow: too faint on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINE_STYLES = ("solid", "dashed", "dotted")
GREY = "#666666"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
}
SMALLEST = 1e-9  # stands for an exact zero on a logarithmic axis
_NAME_LENGTH = 28
_TICK_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Curve:
    """A run with its x coordinates (one a record) and its look, the same in every figure."""

    run: Run
    x: list[float]
    color: str
    style: str

    def series(self, key: str) -> tuple[list[float], list[float]]:
        return self.run.series(key, self.x)

    def line(self, axes: Axes, key: str, **options: object) -> None:
        x, y = self.series(key)
        single = {"marker": "o"} if len(x) == 1 else {}
        axes.plot(x, y, **{"color": self.color, "linestyle": self.style, "linewidth": 1.3, **single, **options})

    def band(self, axes: Axes, prefix: str) -> None:
        """`prefix`/mean as a line inside the band from min to max."""
        self.line(axes, f"{prefix}/mean", linewidth=1.6)
        (x, low), (_, high) = self.series(f"{prefix}/min"), self.series(f"{prefix}/max")
        if len(low) == len(high):
            axes.fill_between(x, low, high, color=self.color, alpha=0.1, linewidth=0)
            self.line(axes, f"{prefix}/min", linewidth=0.5, alpha=0.7)
            self.line(axes, f"{prefix}/max", linewidth=0.5, alpha=0.7)


def over_tokens(runs: Sequence[Run]) -> list[Curve]:
    return [_curve(index, run, run.tokens) for index, run in enumerate(runs)]


def over_time(runs: Sequence[Run]) -> tuple[list[Curve], str]:
    """The runs over their training time, and the unit that suits the longest."""
    longest = max(run.training_seconds[-1] for run in runs)
    size, unit = next((size, unit) for size, unit in ((3600, "h"), (60, "min"), (1, "s")) if longest >= 2 * size or size == 1)
    return [_curve(index, run, [seconds / size for seconds in run.training_seconds]) for index, run in enumerate(runs)], unit


def _curve(index: int, run: Run, x: list[float]) -> Curve:
    style = _LINE_STYLES[index // len(COLORS) % len(_LINE_STYLES)]
    return Curve(run, x, COLORS[index % len(COLORS)], style)


def token_axis(axes: Axes) -> None:
    """For drawn axes: a limit set earlier would hold them at matplotlib's empty 0 to 1."""
    axes.set_xlabel("tokens trained on")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(value)))


def time_axis(axes: Axes, unit: str) -> None:
    """For drawn axes, as `token_axis`."""
    axes.set_xlabel(f"training time ({unit})")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_TICK_STEPS))


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis whose ticks are plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def reference(axes: Axes, curves: Sequence[Curve], key: str, label: str) -> None:
    """A dashed line at the value of a config key, where all runs agree on it."""
    values = {curve.run.flat_config.get(key) for curve in curves}
    value = values.pop()
    if values or not value:
        return
    axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
    # placed in the coordinates of the frame across, of the data upwards
    options = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right", "va": "bottom"}
    axes.annotate(f"{label} {value:g}", (0.99, value), (0, 2), color=GREY, fontsize=9, **options)


def name_ends(axes: Axes, curves: Sequence[Curve], keys: Sequence[str]) -> None:
    """Write each run's name beside the end of its curve (the last of `keys` that it has), moved apart where ends meet."""
    to_frame = axes.transData + axes.transAxes.inverted()
    axes.autoscale_view()
    ends = []
    for curve in curves:
        values = [value for key in keys for value in curve.series(key)[1] if math.isfinite(value)]
        if values:
            height = to_frame.transform((0.0, max(values[-1], SMALLEST)))[1]
            ends.append((min(max(height, 0.0), 1.0), curve))
    ends.sort(key=lambda end: end[0])
    gap = min(0.065, 1 / max(1, len(ends)))
    heights: list[float] = []
    for end, _ in ends:
        heights.append(max(end, heights[-1] + gap) if heights else end)
    overshoot = max(0.0, heights[-1] - 1.0) if heights else 0.0
    for height, (_, curve) in zip(heights, ends, strict=True):
        name = _short(curve.run.name)
        axes.text(1.01, height - overshoot, name, color=curve.color, transform=axes.transAxes, va="center", fontsize=9, parse_math=False)


def name_above(figure: Figure, curves: Sequence[Curve]) -> None:
    """One legend for a figure of several axes."""
    handles = [Line2D([], [], color=curve.color, linestyle=curve.style, linewidth=2) for curve in curves]
    # names are set afterwards: a legend drops labels that begin with an underscore
    legend = figure.legend(handles, ["name"] * len(curves), loc="outside upper left", ncols=min(4, len(curves)), frameon=False)
    for text, curve in zip(legend.get_texts(), curves, strict=True):
        text.set_text(_short(curve.run.name))
        text.set_parse_math(False)
        text.set_color(curve.color)


def _short(name: str) -> str:
    """A long name with its middle cut out: names of runs differ at the ends."""
    half = (_NAME_LENGTH - 1) // 2
    return name if len(name) <= _NAME_LENGTH else f"{name[:half]}…{name[-half:]}"
