"""What all figures share: style, colours, axes, curves and their legend."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rcParams
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import blended_transform_factory

from ngpt.analysis import formats
from ngpt.analysis.groups import Group, Series

# Colours in light and dark mode, by their names in the page's style sheet.
_SHADES = {
    "--text": ("#1c1e21", "#e6e8eb"),
    "--muted": ("#5e636a", "#a3a9b1"),
    "--rule": ("#dcdfe4", "#363b42"),
    "--card": ("#ffffff", "#1d2024"),
    # Okabe and Ito's palette, safe for common colour blindness; without its yellow, which is too faint on white
    "--series-1": ("#0072b2", "#4da3e0"),
    "--series-2": ("#d55e00", "#ff8b4a"),
    "--series-3": ("#009e73", "#2fc99b"),
    "--series-4": ("#cc79a7", "#e8a0c8"),
    "--series-5": ("#e69f00", "#f2bd4a"),
    "--series-6": ("#56b4e9", "#a8dcff"),
    "--series-7": ("#000000", "#ffffff"),
    # for layers, first to last; lightness rises evenly, as in viridis
    "--depth-1": ("#440154", "#8f63c2"),
    "--depth-2": ("#443983", "#6f83d6"),
    "--depth-3": ("#31688e", "#4d9cc4"),
    "--depth-4": ("#21918c", "#35b8ad"),
    "--depth-5": ("#35b779", "#7ad151"),
    "--depth-6": ("#8bc034", "#fde725"),
}
CSS_NAMES = {light: name for name, (light, _) in _SHADES.items()}
LIGHT, DARK = ({name: shades[index] for name, shades in _SHADES.items()} for index in (0, 1))
TEXT, GREY, GRID, PAPER = (LIGHT[name] for name in ("--text", "--muted", "--rule", "--card"))
COLORS = tuple(color for name, color in LIGHT.items() if name.startswith("--series"))
DEPTH_COLORS = tuple(color for name, color in LIGHT.items() if name.startswith("--depth"))
STYLE = {
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": TEXT,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": TEXT,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "mathtext.fontset": "dejavusans",
}
SMALLEST = 1e-9  # shown for an exact zero on a logarithmic axis
POINTS = 1000  # most points drawn per curve
_LINE_STYLES = ("solid", "dashed", "dotted")
_LETTER, _HANDLE = 5.4, 33  # widths in points: a letter of a legend; a handle with its padding
_TICK_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Curve:
    """A group and its style, the same in every figure. `axis`: as in `Group.series`; `unit`: the x axis's unit, in seconds or tokens."""

    group: Group
    color: str
    style: str
    axis: str = "tokens"
    unit: float = 1.0

    def series(self, key: str) -> Series:
        found = self.group.series(key, self.axis)
        return found if self.unit == 1 else Series([x / self.unit for x in found.x], found.mean, found.low, found.high)

    def line(self, axes: Axes, key: str, **options: object) -> None:
        self.draw(axes, self.series(key), **options)

    def draw(self, axes: Axes, found: Series, **options: object) -> None:
        """The mean as a line, inside a band between the extremes if there are several runs. A single point is a dot."""
        shown = thinned(found)
        single = {"marker": "o", "markersize": 5} if len(shown) == 1 else {}
        axes.plot(shown.x, shown.mean, **{"color": self.color, "linestyle": self.style, "linewidth": 1.5, **single, **options})
        if len(self.group.runs) > 1:
            axes.fill_between(shown.x, shown.low, shown.high, color=self.color, alpha=0.18, linewidth=0)

    def band(self, axes: Axes, prefix: str) -> None:
        """`prefix`/mean as a line, inside the band from the lowest min to the highest max."""
        low, mean, high = (self.series(f"{prefix}/{part}") for part in ("min", "mean", "max"))
        self.draw(axes, Series(mean.x, mean.mean, mean.mean, mean.mean), linewidth=1.6)
        if low.x == mean.x == high.x:
            band = thinned(Series(mean.x, mean.mean, low.low, high.high))
            axes.fill_between(band.x, band.low, band.high, color=self.color, alpha=0.15, linewidth=0)


def over_tokens(groups: Sequence[Group]) -> list[Curve]:
    return [_curve(index, group) for index, group in enumerate(groups)]


def over_time(groups: Sequence[Group]) -> tuple[list[Curve], str]:
    """The groups as curves over training time, and the time unit that suits the longest run."""
    longest = max(run.training_seconds[-1] for group in groups for run in group.runs)
    size, unit = next((size, unit) for size, unit in ((3600, "h"), (60, "min"), (1, "s")) if longest >= 2 * size or size == 1)
    return [_curve(index, group, "training_seconds", size) for index, group in enumerate(groups)], unit


def _curve(index: int, group: Group, axis: str = "tokens", unit: float = 1.0) -> Curve:
    style = _LINE_STYLES[index // len(COLORS) % len(_LINE_STYLES)]
    return Curve(group, COLORS[index % len(COLORS)], style, axis, unit)


def thinned(found: Series, points: int = POINTS) -> Series:
    """At most `points` of the points: the lowest and the highest mean of each stretch, so that no spike is lost. Gaps stay gaps."""
    if len(found) <= points:
        return found
    kept = {0, len(found) - 1}
    size = math.ceil(2 * len(found) / (points - 2))
    for start in range(0, len(found), size):
        stretch = range(start, min(start + size, len(found)))
        finite = [index for index in stretch if math.isfinite(found.mean[index])]
        # a stretch with a non-finite value keeps that one instead of its highest
        broken = [index for index in stretch if not math.isfinite(found.mean[index])][:1]
        kept |= {*sorted(finite, key=found.mean.__getitem__)[:1], *(broken or sorted(finite, key=found.mean.__getitem__)[-1:])}
    return found.only(sorted(kept))


def token_axis(axes: Axes) -> None:
    """Formats x as tokens. Call it after drawing: a limit set earlier would freeze matplotlib's empty 0 to 1. Chosen limits stay."""
    axes.set_xlabel("tokens trained on")
    if axes.get_autoscalex_on():
        axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(value)))


def time_axis(axes: Axes, unit: str) -> None:
    """Formats x as time. Call it after drawing, as `token_axis`."""
    axes.set_xlabel(f"training time ({unit})")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS))


def log_axis(axes: Axes, least: float = 2.0) -> None:
    """A logarithmic y axis that fits what has been drawn, with plain numbers as ticks.

    Args:
        least: smallest ratio of the frame's upper to its lower end; otherwise rounding would fill the frame around a single value.
    """
    axes.set_yscale("log")
    axes.autoscale_view()
    low, high = axes.get_ylim()
    if 0 < low <= high < least * low:
        low, high = math.sqrt(low * high / least), math.sqrt(low * high * least)
    axes.set_ylim(low, high)
    decades = math.log10(high / low)
    if decades < 1:
        ticks = [tick for tick in MaxNLocator(5, steps=_TICK_STEPS).tick_values(low, high) if low <= tick <= high]
        axes.yaxis.set_major_locator(FixedLocator(ticks))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def reference(axes: Axes, curves: Sequence[Curve], key: str, label: str) -> list[Artist]:
    """A dashed line at the value of a config key if all runs agree on it. Returns its legend entries.

    It never widens the frame: a value outside appears only in the legend.
    """
    value = curves[0].group.agreed(key)
    if any(curve.group.agreed(key) != value for curve in curves) or not isinstance(value, int | float) or not value:
        return []
    low, high = axes.get_ylim()
    if low <= value <= high:
        axes.axhline(value, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
        return [Line2D([], [], color=GREY, linestyle=(0, (4, 3)), linewidth=1, label=f"{label} {value:g}")]
    where = "above" if value > high else "below"
    return [Line2D([], [], linestyle="none", label=f"{label} {value:g}, {where} this frame")]


def legend(axes: Axes, curves: Sequence[Curve], more: Sequence[Artist] = (), lift: float = 0.0) -> None:
    """Names of the groups, and `more` below them. The legend is above the axes, so it covers no curve.

    Args:
        lift: inches between legend and axes, for a title of the axes.
    """
    figure = axes.get_figure(root=True)
    width = 72 * axes.figure.bbox.width / figure.dpi - 8
    below = list(more)
    if any(len(curve.group.runs) > 1 for curve in curves):
        below.append(Patch(facecolor=GREY, alpha=0.25, label="least to largest of the seeds"))
    lift = _rows(axes, below, [str(artist.get_label()) for artist in below], width, 72 * lift)
    # two names per row; if there are only two names, each gets the full width
    length = int(((width if len(curves) < 3 else width / 2) - _HANDLE) / _LETTER)
    handles = [Line2D([], [], color=curve.color, linestyle=curve.style, linewidth=2.2) for curve in curves]
    _rows(axes, handles, [formats.short(curve.group.label, length) for curve in curves], width, lift)


def _rows(axes: Axes, handles: Sequence[Artist], labels: Sequence[str], width: float, lift: float) -> float:
    """Draws legend entries from the figure's left, `lift` points above the axes. Returns the `lift` for the next entries above them."""
    if not labels:
        return lift
    columns = next((n for n in range(len(labels), 1, -1) if _legend_width(labels, n) <= width), 1)
    rows = math.ceil(len(labels) / columns)
    columns = math.ceil(len(labels) / rows)  # rows of equal length
    options = {"borderpad": 0.0, "handlelength": 1.5, "columnspacing": 1.2, "labelspacing": 0.3, "loc": "lower left", "ncols": columns}
    across = blended_transform_factory(axes.figure.transSubfigure, axes.transAxes)
    size = rcParams["legend.fontsize"]
    pad = (lift + 4) / size  # in units of the font size
    left = 0.01 - (lift + 4) / (72 * axes.figure.bbox.width / axes.get_figure(root=True).dpi)  # the pad also moves it to the right
    # names are set afterwards: a legend drops labels that begin with an underscore
    made = Legend(axes, handles, ["name"] * len(labels), bbox_to_anchor=(left, 1.0), bbox_transform=across, borderaxespad=pad, **options)
    axes.add_artist(made)
    made.set_clip_on(False)  # the layout gives no room to what is clipped to the axes
    for text, label in zip(made.get_texts(), labels, strict=True):
        text.set_text(label)
        text.set_parse_math(False)
    return lift + rows * 1.45 * size


def _legend_width(labels: Sequence[str], columns: int) -> float:
    """Width in points of a legend with this many columns; matplotlib fills it column by column."""
    rows = math.ceil(len(labels) / columns)
    widest = [max(len(label) for label in labels[start : start + rows]) for start in range(0, len(labels), rows)]
    return sum(_LETTER * length + _HANDLE for length in widest)
