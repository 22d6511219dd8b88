"""Figures of single layers (`precision/<layer>/<part>/<figure>`): maps of layer by step, and lines on demand.

A panel shows one part: a GEMM or an operand. In it, the kinds of linears are stacked in model order.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ngpt.analysis import drawing
from ngpt.analysis.drawing import Curve
from ngpt.analysis.groups import Group, Series
from ngpt.analysis.sheets import Name, Panel, Sheet

_KEY = re.compile(r"(precision/layers\.(\d+)\.([^/]+)/([^/]+))/([^/]+)")
_GEMMS = ("fprop", "dgrad", "wgrad")
_OPERANDS = ("input", "weight", "grad_output")
_WIDTH = 4.4
# inches: beside the axes, below them, a kind's title, the colour bar, a legend of three rows, the line plots
_LEFT, _RIGHT, _BOTTOM, _TITLE, _BAR, _LEGEND, _LINES = 0.9, 0.12, 0.46, 0.24, 0.54, 0.6, 1.2
_COLORMAP = "viridis"  # even in lightness, safe for colour blindness, visible on light and dark

_MAP = "A row a layer, a column a health step; an empty cell was not logged or not finite. Colours leave out the outer 1 % of all cells."

# kind of linear -> part -> (depth, key without its figure) of each layer
Grid = dict[str, dict[str, list[tuple[int, str]]]]
Rows = dict[str, list[tuple[int, str]]]  # kind -> layers, for one part


@dataclass(frozen=True)
class _Figure:
    """A figure that every low-precision layer logs. `parts`: the GEMMs or operands it is logged for."""

    figure: str
    title: str
    label: str
    parts: tuple[str, ...]
    caption: str


def sheets_of(groups: Sequence[Group], keys: Iterable[str]) -> list[Sheet]:
    """A sheet of maps and a folded one of lines for each figure that any run logged. `keys`: every key that any run logged."""
    found = []
    for spec in _FIGURES:
        layers = find_layers(keys, spec.figure, spec.parts)
        if layers:
            found += [_map_sheet(spec, layers, groups), _line_sheet(spec, layers, groups)]
    return found


def find_layers(keys: Iterable[str], figure: str, parts: Sequence[str]) -> Grid:
    """The layers whose `figure` of one of `parts` is in `keys`, by kind and part. Kinds are in model order, depths increase.

    A kind is a layer's name without numbers: `self_attention.linear_qkv`, `mlp.linear_fc1`.
    """
    found: Grid = {}
    for match in sorted(filter(None, map(_KEY.fullmatch, keys)), key=lambda match: int(match[2])):
        prefix, depth, name, part, name_of_figure = match.groups()
        if name_of_figure == figure and part in parts:
            kind = ".".join(word for word in name.split(".") if not word.isdigit())
            found.setdefault(kind, {}).setdefault(part, []).append((int(depth), prefix))
    return found


def is_drawn(key: str) -> bool:
    """Whether a metrics key is a layer's figure that some sheet shows."""
    match = _KEY.fullmatch(key)
    return match is not None and any(match[5] == spec.figure and match[4] in spec.parts for spec in _FIGURES)


def _map_sheet(spec: _Figure, layers: Grid, groups: Sequence[Group]) -> Sheet:
    logged = [group for group in groups if any(len(group.series(f"{prefix}/{spec.figure}")) for prefix in _prefixes(layers))]
    limits = _limits([group.series(f"{prefix}/{spec.figure}") for group in logged for prefix in _prefixes(layers)])
    panels = []
    for group in logged:
        for part in spec.parts:
            rows = {kind: by_part.get(part, []) for kind, by_part in layers.items() if by_part.get(part)}
            if rows:
                draw = partial(_draw_maps, group=group, rows=rows, spec=spec, limits=limits)
                name = Name(part if len(groups) == 1 else f"{part}, {group.label}")
                panels.append(Panel(name, draw, _WIDTH, _map_height(rows), placed=True))
    return Sheet(spec.figure, spec.title, f"{spec.caption} {_MAP}", "Precision", tuple(panels), columns=len(spec.parts))


def _prefixes(layers: Grid) -> Iterable[str]:
    return (prefix for by_part in layers.values() for found in by_part.values() for _, prefix in found)


def _height(found: Sequence[object]) -> float:
    """Height in inches of the rows of a kind."""
    return max(0.3, min(0.15 * len(found), 0.9), 0.075 * len(found))


def _map_height(rows: Rows) -> float:
    return _BAR + sum(_TITLE + _height(found) for found in rows.values()) + _BOTTOM


def _limits(found: Iterable[Series]) -> tuple[float, float]:
    """The colour range, from the first to the 99th percentile, so that one outlier does not take all of it."""
    values = sorted(value for series in found for value in series.mean if math.isfinite(value))
    if not values:
        return 0.0, 1.0
    cut = len(values) // 100
    return values[cut], values[-1 - cut]


def _draw_maps(figure: FigureBase, group: Group, rows: Rows, spec: _Figure, limits: tuple[float, float]) -> None:
    series = {prefix: group.series(f"{prefix}/{spec.figure}") for found in rows.values() for _, prefix in found}
    columns = sorted({x for found in series.values() for x in found.x})
    place = {x: column for column, x in enumerate(columns)}
    top = _top(figure, _map_height(rows))
    cells = _stack(figure, top + _BAR, [_height(found) for found in rows.values()])
    for axes, (kind, found) in zip(cells, rows.items(), strict=True):
        values = numpy.full((len(found), len(columns)), numpy.nan)
        for row, (_, prefix) in enumerate(found):
            for x, value in zip(series[prefix].x, series[prefix].mean, strict=True):
                values[row, place[x]] = value if math.isfinite(value) else math.nan
        look = {"cmap": _COLORMAP, "vmin": limits[0], "vmax": limits[1], "aspect": "auto", "interpolation": "nearest"}
        image = axes.imshow(numpy.ma.masked_invalid(values), **look)
        axes.set_title(kind, fontsize=9, pad=3)
        axes.grid(False)
        _layer_ticks(axes, [depth for depth, _ in found])
    at = _steps(group)
    steps = [f"{at[x]:,}" for x in columns]
    cells[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    cells[-1].xaxis.set_major_formatter(FuncFormatter(lambda column, _: steps[int(column)] if 0 <= column < len(steps) else ""))
    cells[-1].set_xlabel("step")
    cells[0].set_ylabel("layer")
    bar = figure.colorbar(image, cax=_place(figure, top + 0.22, 0.09), orientation="horizontal", ticks=MaxNLocator(5))
    bar.ax.set_title(spec.label, fontsize=9, pad=3, color=drawing.GREY)
    bar.outline.set_visible(False)


def _steps(group: Group) -> dict[float, int]:
    return dict(zip(group.runs[0].tokens, (record["step"] for record in group.runs[0].metrics), strict=True))


def _top(figure: FigureBase, height: float) -> float:
    """Inches above a panel of this height in its figure."""
    return figure.bbox.height / figure.get_figure(root=True).dpi - height


def _place(figure: FigureBase, top: float, height: float, **options: object) -> Axes:
    """Axes that begin `top` inches below the figure's upper edge."""
    dpi = figure.get_figure(root=True).dpi
    width, whole = figure.bbox.width / dpi, figure.bbox.height / dpi
    return figure.add_axes((_LEFT / width, 1 - (top + height) / whole, 1 - (_LEFT + _RIGHT) / width, height / whole), **options)


def _stack(figure: FigureBase, top: float, heights: Sequence[float], sharey: bool = False) -> list[Axes]:
    """Stacked axes with a common x axis, each with room for its title. Placed by hand: a layout solver takes seconds."""
    cells: list[Axes] = []
    for height in heights:
        shared = {"sharex": cells[0], **({"sharey": cells[0]} if sharey else {})} if cells else {}
        cells.append(_place(figure, top + _TITLE, height, **shared))
        top += _TITLE + height
    for axes in cells[:-1]:
        axes.tick_params(labelbottom=False)
    return cells


def _layer_ticks(axes: Axes, depths: Sequence[int]) -> None:
    """Labels rows with their depths: all if they are few, else as many as fit."""
    stride = math.ceil(len(depths) * 0.15 / _height(depths))
    shown = range(0, len(depths), stride)
    axes.set_yticks(list(shown), [str(depths[row]) for row in shown])


def _line_sheet(spec: _Figure, layers: Grid, groups: Sequence[Group]) -> Sheet:
    curves = [
        curve for curve in drawing.over_tokens(groups) if any(len(curve.series(f"{prefix}/{spec.figure}")) for prefix in _prefixes(layers))
    ]
    colors = _depth_colors(sorted({depth for by_part in layers.values() for found in by_part.values() for depth, _ in found}))
    panels = []
    for part in spec.parts:
        rows = {kind: by_part[part] for kind, by_part in layers.items() if by_part.get(part)}
        if rows:
            draw = partial(_draw_lines, curves=curves, rows=rows, spec=spec, colors=colors)
            panels.append(Panel(Name(part), draw, _WIDTH, _line_height(rows), placed=True))
    shown = "One line a layer, coloured by its depth." if _is_single(curves) else "Line: mean over layers; band: least to largest."
    return Sheet(f"{spec.figure}_lines", f"{spec.title}: lines", shown, "Precision", tuple(panels), columns=len(panels), folded=True)


def _line_height(rows: Rows) -> float:
    return _LEGEND + len(rows) * (_TITLE + _LINES) + _BOTTOM


def _is_single(curves: Sequence[Curve]) -> bool:
    return len(curves) == 1 and len(curves[0].group.runs) == 1


def _depth_colors(depths: Sequence[int]) -> dict[int, tuple[str, str]]:
    """(colour, its name in a legend) of each depth. Neighbours share a colour if there are more depths than colours."""
    share = math.ceil(len(depths) / len(drawing.DEPTH_COLORS))
    bins = [depths[start : start + share] for start in range(0, len(depths), share)]
    # with few bins, use colours that are far apart
    spread = [round(index * (len(drawing.DEPTH_COLORS) - 1) / max(1, len(bins) - 1)) for index in range(len(bins))]
    names = [f"layer {found[0]}" if len(found) == 1 else f"layers {found[0]} to {found[-1]}" for found in bins]
    return {depth: (drawing.DEPTH_COLORS[at], name) for at, name, found in zip(spread, names, bins, strict=True) for depth in found}


def _draw_lines(
    figure: FigureBase, curves: Sequence[Curve], rows: Rows, spec: _Figure, colors: dict[int, tuple[str, str]]
) -> None:
    cells = _stack(figure, _top(figure, _line_height(rows)) + _LEGEND, [_LINES] * len(rows), sharey=True)
    for axes, (kind, found) in zip(cells, rows.items(), strict=True):
        axes.set_title(kind, fontsize=9)
        for curve in curves:
            if _is_single(curves):
                for depth, prefix in found:
                    curve.line(axes, f"{prefix}/{spec.figure}", color=colors[depth][0], linewidth=1)
            else:
                _draw_band(axes, curve, [f"{prefix}/{spec.figure}" for _, prefix in found])
        drawing.token_axis(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in cells[:-1]:
        axes.set_xlabel("")
    cells[0].set_ylabel(spec.label, labelpad=7)
    if _is_single(curves):
        used = {colors[depth] for found in rows.values() for depth, _ in found}
        shown = [color for color in dict.fromkeys(colors.values()) if color in used]
        handles = [Line2D([], [], color=color, linewidth=2.2, label=name) for color, name in shown]
        drawing.legend(cells[0], [], handles, lift=_TITLE)
    else:
        handles = [Patch(facecolor=drawing.GREY, alpha=0.25, label="least to largest of layers and seeds")]
        drawing.legend(cells[0], curves, handles, lift=_TITLE)


def _draw_band(axes: Axes, curve: Curve, keys: Sequence[str]) -> None:
    """Mean over the layers, inside a band between their extremes, at each record with the figure of any of them."""
    at: dict[float, list[tuple[float, float, float]]] = {}
    for key in keys:
        found = curve.series(key)
        for x, *values in zip(found.x, found.mean, found.low, found.high, strict=True):
            if all(map(math.isfinite, values)):
                at.setdefault(x, []).append(tuple(values))
    x = sorted(at)
    middle = [fmean(mean for mean, _, _ in at[place]) for place in x]
    low, high = ([reduce(values[index] for values in at[place]) for place in x] for reduce, index in ((min, 1), (max, 2)))
    shown = drawing.thinned(Series(x, middle, low, high))
    single = {"marker": "o"} if len(shown) == 1 else {}
    axes.plot(shown.x, shown.mean, color=curve.color, linestyle=curve.style, linewidth=1.6, **single)
    axes.fill_between(shown.x, shown.low, shown.high, color=curve.color, alpha=0.15, linewidth=0)


_FIGURES = (
    _Figure(
        "dot_snr_db",
        "Signal-to-noise ratio of dot products",
        "dot-product SNR (dB)",
        _GEMMS,
        "Power of the exact dot products of each matrix product over the power of their quantisation errors.",
    ),
    _Figure(
        "relative_error",
        "Relative quantisation error of operands",
        "relative error",
        _OPERANDS,
        "‖quantised − exact‖ / ‖exact‖ of each operand, quantised along its rows.",
    ),
    _Figure(
        "signal_correlation",
        "Correlation of product terms",
        "mean correlation",
        _GEMMS,
        "Mean over the pairs of terms of a dot product. Terms above zero add up coherently.",
    ),
    _Figure(
        "noise_correlation",
        "Correlation of the terms' errors",
        "mean correlation",
        _GEMMS,
        "Mean over the pairs of errors of a dot product's terms. Errors near zero average out.",
    ),
)
