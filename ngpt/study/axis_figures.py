"""A study's figures over a scanned key, and over layers."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import FigureBase
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, Formatter, NullLocator

from ngpt.analysis import drawing, formats
from ngpt.analysis.intervals import BETWEEN, Interval
from ngpt.analysis.sheets import Panel
from ngpt.study.drawing import Results, RowLike, color_of, has_number, legend, row_name, title_of, unit_of

_STYLES = ("solid", "dashed", "dotted", "dashdot")
_GAP = 6  # points between the labels of two places
_EXTRAPOLATED = 16_384  # the averaging model is drawn up to this width
type Model = tuple[str, list[float], list[float]]  # arm, widths, dB


def axis(results: Results, figure: Mapping[str, Any]) -> list[Panel]:
    """A panel for each comparison. Those of one unit have the same frame, so that small differences do not look like large ones."""
    shown = {}
    for name in figure["of"]:
        found = results["comparisons"][name]["rows"]
        rows = [row for row in found if figure["over"] in row["point"] and has_number(row)]
        if rows:
            shown[name] = rows
    models = averaging_model(results, figure) if figure["model"] == "averaging" else []
    units = {name: unit_of(results, name) for name in shown}
    panels = []
    for name, rows in shown.items():
        frame = _frame([row for other in shown if units[other] == units[name] for row in shown[other]], models)
        draw = partial(_draw_axis, rows=rows, over=figure["over"], unit=units[name], models=models, frame=frame)
        panels.append(Panel(title_of(results, figure, name), draw, height=3.6))
    return panels


def _frame(rows: Sequence[RowLike], models: Sequence[Model]) -> tuple[float, float]:
    intervals = [Interval.from_json(row["interval"]) for row in rows]
    ends = [end for one in intervals for end in ((one.low, one.high, one.estimate) if one.bounded else (one.estimate,))]
    ends += [value for _, _, y in models for value in y if math.isfinite(value)]
    room = 0.05 * (max(ends) - min(ends)) or 0.05 * abs(ends[0]) or 1.0
    return min(ends) - room, max(ends) + room


def _lines(rows: Sequence[RowLike], over: str) -> dict[tuple[Any, ...], list[RowLike]]:
    """Rows grouped into lines: those of a line differ only in the scanned key, and are in its order."""
    lines: dict[tuple[Any, ...], list[RowLike]] = {}
    for row in sorted(rows, key=lambda row: float(row["point"][over])):
        rest = tuple((key, value) for key, value in row["point"].items() if key != over)
        lines.setdefault((row["arm"], *rest), []).append(row)
    return lines


def _draw_axis(
    figure: FigureBase, rows: Sequence[RowLike], over: str, unit: str, models: Sequence[Model], frame: tuple[float, float]
) -> None:
    axes, names, seen = figure.subplots(), [], dict[str, int]()
    for (arm, *rest), line in _lines(rows, over).items():
        color = color_of(arm)
        seen[color] = seen.get(color, -1) + 1
        style = _STYLES[seen[color] % len(_STYLES)]
        intervals = [Interval.from_json(row["interval"]) for row in line]
        x, y = [float(row["point"][over]) for row in line], [one.estimate for one in intervals]
        axes.plot(x, y, color=color, linestyle=style, linewidth=1.5, marker="o", markersize=4)
        for place, one in zip(x, intervals, strict=True):
            if one.bounded and one.shape == BETWEEN:
                axes.plot([place, place], [one.low, one.high], color=color, linewidth=1.1, alpha=0.7)
        names.append((row_name(line[0] | {"point": dict(rest)}), color, style))
    for arm, x, y in models:
        axes.plot(x, y, color=color_of(arm), linestyle=(0, (1, 1.6)), linewidth=1.3)
    axes.set_ylim(*frame)
    axes.set_xscale("log", base=2)
    places = sorted({float(row["point"][over]) for row in rows} | ({float(_EXTRAPOLATED)} if models else set()))
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_Spaced())
    axes.set_xlabel(over)
    axes.set_ylabel(unit)
    legend(axes, [*names, *([("1 + (D - 1) rho, rho of other tokens", drawing.GREY, (0, (1, 1.6)))] if models else [])])


class _Spaced(Formatter):
    """Labels of the places, from the left, without those that would run into the one before."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        axes = self.axis.axes
        at = axes.transData.transform([(value, 0.0) for value in values])[:, 0] * 72 / axes.get_figure(root=True).dpi
        font, end, labels = FontProperties(size=rcParams["xtick.labelsize"]), -math.inf, [self(value) for value in values]
        for place, (label, middle) in enumerate(zip(labels, at, strict=True)):
            half = text_to_path.get_text_width_height_descent(label, font, ismath=False)[0] / 2
            if middle - half < end:
                labels[place] = ""
            else:
                end = middle + half + _GAP
        return labels


def averaging_model(results: Results, figure: Mapping[str, Any]) -> list[Model]:
    """The averaging gain that correlation alone predicts, in dB over the scanned width D, for each arm that has both rhos.

    10 lg (1 + (D - 1) rho of the signal) - 10 lg (1 + (D - 1) rho of the noise), averaged over layers and seeds at that width. Beyond the
    widest model, up to 16,384, its rhos are used.
    """
    by_arm: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for run in results["runs"]:
        width = run["point"].get(figure["over"])
        if width is not None and (pairs := _pairs(run, *figure["rho"])):
            by_arm.setdefault(run["arm"], {}).setdefault(float(width), []).extend(pairs)
    models = []
    for arm, widths in by_arm.items():
        places = sorted(widths)
        beyond = [width for width in (places[-1] * 2.0**power for power in range(1, 20)) if width < _EXTRAPOLATED]
        x = [*places, *beyond, float(_EXTRAPOLATED)]
        models.append((arm, x, [fmean(_gain_db(width, *pair) for pair in widths.get(width, widths[places[-1]])) for width in x]))
    return models


def _pairs(run: Mapping[str, Any], signal: str, noise: str) -> list[tuple[float, float]]:
    """Both correlations of each layer of a run; of the run as a whole if its measures are not per layer."""
    signals, noises = (run["layers"].get(name, {"": run["measures"].get(name)}) for name in (signal, noise))
    return [(signals[layer], noises[layer]) for layer in signals if None not in (signals[layer], noises.get(layer))]


def _gain_db(width: float, signal: float, noise: float) -> float:
    gains = [1 + (width - 1) * rho for rho in (signal, noise)]
    return 10 * math.log10(gains[0] / gains[1]) if min(gains) > 0 else math.nan


def layers(results: Results, figure: Mapping[str, Any]) -> list[Panel]:
    """Panels over layers for the arms of a comparison; an arm that scans is shown at its last point."""
    (name,) = figure["of"]
    measure = results["study"]["comparisons"][name]["measure"]
    last = {row["arm"]: row["point"] for row in results["comparisons"][name]["rows"]}
    by_arm: dict[str, dict[str, list[float]]] = {}
    for run in results["runs"]:
        if run["arm"] in last and run["point"] == last[run["arm"]]:
            for layer, value in run["layers"].get(measure, {}).items():
                by_arm.setdefault(run["arm"], {}).setdefault(layer, []).append(value)
    if not by_arm:
        return []
    names = sorted(dict.fromkeys(layer for found in by_arm.values() for layer in found), key=_natural)
    labels = {arm: row_name({"label": results["study"]["arms"][arm]["label"] or arm, "point": last[arm]}) for arm in by_arm}
    draw = partial(_draw_layers, by_arm=by_arm, names=names, labels=labels, unit=results["study"]["measures"][measure]["unit"])
    return [Panel(None, draw, height=1.0 + 0.2 * len(names))]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _draw_layers(
    figure: FigureBase, by_arm: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str], labels: Mapping[str, str], unit: str
) -> None:
    axes = figure.subplots()
    for arm, layers in by_arm.items():
        for place, name in enumerate(names):
            values = layers.get(name, [])
            axes.plot(values, [place] * len(values), color=color_of(arm), marker="o", markersize=4, linestyle="none", alpha=0.75)
    axes.set_yticks(range(len(names)), [formats.short(name.removeprefix("layers."), 34) for name in names], fontsize=7.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(unit)
    legend(axes, [(labels[arm], color_of(arm), "solid") for arm in by_arm])
