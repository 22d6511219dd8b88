"""A figure with one axes: curves of all groups that logged a key, over tokens or time."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from ngpt.analysis import drawing
from ngpt.analysis.drawing import Curve
from ngpt.analysis.groups import Group
from ngpt.analysis.sheets import Name, Panel, Sheet


@dataclass(frozen=True)
class Lines:
    """What is drawn for the groups that logged one of `keys`.

    `draw` draws the curves and returns the legend entries that follow the names of the groups.
    """

    file: str
    title: str
    y_label: str
    keys: tuple[str, ...]
    draw: Callable[[Axes, list[Curve]], Iterable[Artist]]
    caption: str
    section: str
    over_time: bool = False


def sheet(lines: Lines, groups: Sequence[Group]) -> Sheet | None:
    """The figure as a sheet; None if no group has data for it."""
    if lines.over_time and not any(run.training_seconds[-1] for group in groups for run in group.runs):
        return None
    curves, unit = drawing.over_time(groups) if lines.over_time else (drawing.over_tokens(groups), None)
    return sheet_of_curves(lines, curves, unit)


def sheet_of_curves(lines: Lines, curves: Sequence[Curve], unit: str | None = None) -> Sheet | None:
    """The same for given curves. `unit`: of time; None: the curves are over tokens."""
    logged = [curve for curve in curves if any(len(curve.series(key)) for key in lines.keys)]
    if not logged:
        return None
    height = 3.1 + 0.16 * ((len(logged) - 1) // 2)  # makes room for the rows of the legend
    only = panel(logged, lines.y_label, lines.draw, unit=unit, height=height)
    return Sheet(lines.file, lines.title, lines.caption, lines.section, (only,))


def panel(
    curves: list[Curve],
    y_label: str,
    draw: Callable[[Axes, list[Curve]], Iterable[Artist]],
    name: Name | None = None,
    unit: str | None = None,
    **size: float,
) -> Panel:
    """A panel with one axes. `unit`: of time; None: the curves are over tokens."""
    return Panel(name, partial(_fill, curves=curves, y_label=y_label, draw=draw, unit=unit), **size)


def _fill(figure: FigureBase, curves: list[Curve], y_label: str, draw: Callable[..., Iterable[Artist]], unit: str | None) -> None:
    axes = figure.add_subplot(ylabel=y_label)
    more = list(draw(axes, curves))
    if unit is None:
        drawing.token_axis(axes)
    else:
        drawing.time_axis(axes, unit)
    drawing.legend(axes, curves, more)
