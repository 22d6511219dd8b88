"""Figures of single layers (`precision/<layer>/<part>/<figure>`) as a grid: a row for each kind of linear, a column for each part."""

import math
import re
from collections.abc import Iterable, Sequence
from statistics import fmean

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ngpt.analysis import drawing
from ngpt.analysis.compare import Run
from ngpt.analysis.drawing import Curve

_KEY = re.compile(r"(precision/layers\.(\d+)\.([^/]+)/([^/]+))/([^/]+)")

# kind of linear -> part -> (depth, key without its figure) of each layer
Grid = dict[str, dict[str, list[tuple[int, str]]]]


def find_layers(keys: Iterable[str], figure: str, parts: Sequence[str]) -> Grid:
    """The layers for which `keys` hold `figure` of one of `parts`, by kind and part; kinds in the order of the model, depths rising.

    A kind is a layer's name without its numbers: `self_attention.linear_qkv`, `mlp.linear_fc1`.
    """
    found: Grid = {}
    for match in sorted(filter(None, map(_KEY.fullmatch, keys)), key=lambda match: int(match[2])):
        prefix, depth, name, part, name_of_figure = match.groups()
        if name_of_figure == figure and part in parts:
            kind = ".".join(word for word in name.split(".") if not word.isdigit())
            found.setdefault(kind, {}).setdefault(part, []).append((int(depth), prefix))
    return found


def draw_layers(runs: Sequence[Run], layers: Grid, parts: Sequence[str], figure: str, beside: str | None, y_label: str) -> Figure:
    """One run: a line for each layer, coloured by depth. Several: for each run the mean over the layers in the band of their extremes.

    Args:
        layers: as `find_layers` returns them, not empty.
        parts: the columns.
        figure: what is drawn of each layer.
        beside: a second figure, drawn as grey lines, or for several runs as dotted means.
        y_label: of every axes; those of a column share their limits.
    """
    page = Figure(figsize=(12.5, 0.5 + 2.3 * len(layers)), layout="constrained")
    cells = page.subplots(len(layers), len(parts), squeeze=False, sharex=True, sharey="col")
    curves = drawing.over_tokens(runs)
    depths = [depth for by_part in layers.values() for found in by_part.values() for depth, _ in found]
    colors = ScalarMappable(Normalize(min(depths), max(depths)), colormaps["viridis"])
    for kind, row in zip(layers, cells, strict=True):
        row[0].set_ylabel(y_label)
        for part, axes in zip(parts, row, strict=True):
            axes.set_title(f"{kind}: {part}", fontsize=10)
            found = layers[kind].get(part, [])
            if len(curves) == 1:
                _draw_lines(axes, curves[0], found, figure, beside, colors)
            else:
                _draw_bands(axes, curves, [prefix for _, prefix in found], figure, beside)
    for axes in cells.flat:
        drawing.token_axis(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in cells[:-1].flat:
        axes.set_xlabel("")
    if len(curves) == 1:
        page.colorbar(colors, ax=cells, label="layer", fraction=0.02, pad=0.01, aspect=40, ticks=MaxNLocator(6, integer=True))
    else:
        drawing.name_above(page, [curve for curve in curves if _logged(curve, layers, figure)])
    return page


def _draw_lines(axes: Axes, curve: Curve, found: list[tuple[int, str]], figure: str, beside: str | None, colors: ScalarMappable) -> None:
    for depth, prefix in found:
        if beside:
            curve.line(axes, f"{prefix}/{beside}", color=drawing.GREY, linewidth=0.4)
        curve.line(axes, f"{prefix}/{figure}", color=colors.to_rgba(depth), linewidth=1)


def _draw_bands(axes: Axes, curves: Sequence[Curve], prefixes: list[str], figure: str, beside: str | None) -> None:
    for curve in curves:
        x, values = _over_layers(curve, prefixes, figure)
        low, middle, high = ([reduce(layers) for layers in values] for reduce in (min, fmean, max))
        single = {"marker": "o"} if len(x) == 1 else {}
        axes.plot(x, middle, color=curve.color, linestyle=curve.style, linewidth=1.6, **single)
        axes.fill_between(x, low, high, color=curve.color, alpha=0.15, linewidth=0)
        if beside:
            x, values = _over_layers(curve, prefixes, beside)
            axes.plot(x, [fmean(layers) for layers in values], color=curve.color, linestyle="dotted", linewidth=1.2, **single)


def _over_layers(curve: Curve, prefixes: list[str], figure: str) -> tuple[list[float], list[list[float]]]:
    """The records that hold the figure of any layer, each with its finite values over the layers."""
    at: dict[float, list[float]] = {}
    for prefix in prefixes:
        for x, y in zip(*curve.series(f"{prefix}/{figure}"), strict=True):
            if math.isfinite(y):
                at.setdefault(x, []).append(y)
    return sorted(at), [at[x] for x in sorted(at)]


def _logged(curve: Curve, layers: Grid, figure: str) -> bool:
    prefixes = (prefix for by_part in layers.values() for found in by_part.values() for _, prefix in found)
    return any(curve.series(f"{prefix}/{figure}")[0] for prefix in prefixes)
