"""The figures of a study's page, drawn only from its results."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import NullLocator

from ngpt.analysis import drawing
from ngpt.analysis.intervals import ALL, OUTSIDE, Interval
from ngpt.analysis.sheets import Name, Panel, Sheet
from ngpt.study.axis_figures import axis, layers
from ngpt.study.drawing import ARCHITECTURES, Results, RowLike, color_of, has_number, left_out, legend, row_name, title_of, unit_of

_OF_KINDS = drawing.COLORS[2:]  # the first two are those of the architectures


def sheets_of(results: Results) -> list[Sheet]:
    """The figures that have numbers, the main one first."""
    made = enumerate(((_SHEETS[figure["kind"]](results, figure), figure) for figure in results["study"]["figures"]), start=1)
    return [_sheet(f"{number}_{figure['kind']}", figure, panels, left_out(results, figure)) for number, (panels, figure) in made if panels]


def absent(results: Results) -> list[str]:
    """A line for each figure that is not drawn, since none of its arms has a number."""
    undrawn = [figure for figure in results["study"]["figures"] if not _SHEETS[figure["kind"]](results, figure)]
    return [f"No figure “{figure['title']}”. {left_out(results, figure) or 'This size has no arm for it.'}" for figure in undrawn]


def _sheet(file: str, figure: Mapping[str, Any], panels: Sequence[Panel], note: str) -> Sheet:
    caption = [figure["caption"], note]
    if len(panels) == 1 and panels[0].name:  # the page gives a single panel its full width
        caption.insert(0, f"{panels[0].name.text}.")
        panels = [replace(panels[0], name=None)]
    return Sheet(file, figure["title"], " ".join(filter(None, caption)), "Figures", tuple(panels), columns=2)


def _intervals(results: Results, figure: Mapping[str, Any]) -> list[Panel]:
    panels = []
    for name in figure["of"]:
        rows = [row for row in results["comparisons"][name]["rows"] if has_number(row)]
        if not rows:
            continue
        height = 0.75 + 0.36 * len(rows)
        draw = partial(_draw_intervals, rows=rows, unit=unit_of(results, name), kind=results["study"]["comparisons"][name]["kind"])
        panels.append(Panel(title_of(results, figure, name), draw, height=height))
    return panels


def _draw_intervals(figure: FigureBase, rows: Sequence[RowLike], unit: str, kind: str) -> None:
    axes = figure.subplots()
    intervals = [Interval.from_json(row["interval"]) for row in rows]
    reference = 1.0 if kind in ("ratio", "reach") else 0.0
    marked = kind != "optimum" or any(row["less"] for row in rows)
    ends = [end for one in intervals for end in ((one.low, one.high, one.estimate) if one.bounded else (one.estimate,))]
    low, high = min([*ends, *([reference] if marked else [])]), max([*ends, *([reference] if marked else [])])
    margin = 0.08 * (high - low) or 0.1
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(len(rows) - 0.35, -0.75)
    if marked:
        axes.axvline(reference, color=drawing.GREY, linewidth=1)
    for place, (row, one) in enumerate(zip(rows, intervals, strict=True)):
        _draw_interval(axes, one, place, color_of(row["arm"]))
        words = row_name(row) + ("" if one.bounded else _without_end(one))
        look = {"fontsize": 8.5, "color": drawing.TEXT, "bbox": {"facecolor": drawing.PAPER, "edgecolor": "none", "pad": 0.8}}
        axes.text(0.0, place - 0.28, words, transform=axes.get_yaxis_transform(), parse_math=False, **look)
    axes.locator_params(axis="x", nbins=5)  # labels of small numbers are long
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(unit)


def _draw_interval(axes: Axes, one: Interval, place: int, color: str) -> None:
    low, high = axes.get_xlim()
    if one.shape == OUTSIDE:
        spans = [(low, min(one.low, high)), (max(one.high, low), high)]
    else:
        spans = [(max(one.low, low), min(one.high, high))]
    for start, end in spans:
        if start < end:
            style = "solid" if one.bounded else (0, (2, 2))
            axes.plot([start, end], [place, place], color=color, linewidth=1.8, linestyle=style, solid_capstyle="butt")
    axes.plot([one.estimate], [place], color=color, marker="o", markersize=5.5, linestyle="none")


def _without_end(one: Interval) -> str:
    if one.shape == ALL:
        return ": the data exclude nothing"
    if one.shape == OUTSIDE:
        return f": excludes {one.low:.3g} to {one.high:.3g} alone"
    return ": without an end"


def _tokens(results: Results, figure: Mapping[str, Any]) -> list[Panel]:
    """One panel per architecture, all with the same frame."""
    panels = []
    for name in figure["of"]:
        curves = [curve for curve in results["comparisons"][name].get("curves", []) if curve["places"]]
        if not curves:
            continue
        families: dict[str, list[Mapping[str, Any]]] = {}
        for curve in curves:
            families.setdefault(curve["arm"].partition("_")[0], []).append(curve)
        frame = _frame(curves)
        kinds = list(dict.fromkeys(map(_kind, curves)))
        for family, members in families.items():
            changes = [run["phase_change"] for run in results["runs"] if run["arm"].startswith(f"{family}_") and run["phase_change"]]
            colors = [_OF_KINDS[kinds.index(_kind(curve)) % len(_OF_KINDS)] for curve in members]
            draw = partial(_draw_tokens, curves=members, colors=colors, frame=frame, changes=changes, unit=unit_of(results, name))
            panels.append(Panel(Name(ARCHITECTURES.get(family, family)), draw, height=3.2 + 0.17 * len(members)))
    return panels


def _kind(curve: RowLike) -> tuple[Any, ...]:
    """The key by which curves share a colour in the panels of both architectures."""
    return (curve["arm"].partition("_")[2], *curve["point"].items())


def _frame(curves: Sequence[RowLike]) -> tuple[float, float]:
    """The y limits of all panels: the means, and of differences also zero, with room for part of their intervals.

    Intervals of three seeds are so wide that the whole of them would leave the means flat.
    """
    means = [place["estimate"] for curve in curves for place in curve["places"]]
    differences = any(curve["less"] for curve in curves)
    means += [0.0] if differences else []
    room = (0.6 if differences else 0.1) * (max(means) - min(means)) or 1e-3
    return min(means) - room, max(means) + room


def _draw_tokens(
    figure: FigureBase,
    curves: Sequence[RowLike],
    colors: Sequence[str],
    frame: tuple[float, float],
    changes: Sequence[float],
    unit: str,
) -> None:
    axes = figure.subplots()
    if any(curve["less"] for curve in curves):
        axes.axhline(0, color=drawing.GREY, linewidth=1)
    axes.set_ylim(*frame)
    for curve, color in zip(curves, colors, strict=True):
        x = [place["tokens"] for place in curve["places"]]
        axes.plot(x, [place["estimate"] for place in curve["places"]], color=color, linewidth=1.5, marker="o", markersize=2.5)
        bounded = [place for place in curve["places"] if place["low"] is not None]
        band = ([place[key] for place in bounded] for key in ("tokens", "low", "high"))
        axes.fill_between(*band, color=color, alpha=0.13, linewidth=0)
    for change in changes:
        axes.axvline(change, color=drawing.GREY, linestyle=(0, (2, 3)), linewidth=0.8)
    drawing.token_axis(axes)
    axes.set_xlim(left=min([*changes, *(place["tokens"] for curve in curves for place in curve["places"])]))
    axes.set_ylabel(unit)
    names = [(row_name(curve), color, "solid") for curve, color in zip(curves, colors, strict=True)]
    legend(axes, [*names, *([("phase change of a run", drawing.GREY, (0, (2, 3)))] if changes else [])])


_SHEETS = {"intervals": _intervals, "tokens": _tokens, "axis": axis, "layers": layers}
