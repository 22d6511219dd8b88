"""A sheet is what a reader sees as one figure: one or more panels, written as one PNG and, for the page, as one SVG per panel.

A wide page shows the panels side by side, a phone shows them stacked. The PNG has them in a grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure, FigureBase

from ngpt.analysis import svg

_DPI = 150
_HEAD = 0.34  # inches for a title


@dataclass(frozen=True)
class Name:
    """The name of what a panel shows. `symbol`: letter and index, as in nGPT's equations: ("α", "A"); `key`: name in config and code."""

    text: str
    symbol: tuple[str, str] | None = None
    key: str = ""

    def __str__(self) -> str:
        """The name for matplotlib, which reads the part between dollar signs as mathematics."""
        letter = rf"${self.symbol[0]}_{{\mathrm{{{self.symbol[1]}}}}}$ " if self.symbol else ""
        return letter + self.text.replace("$", r"\$") + (f" ({self.key})" if self.key else "")


@dataclass(frozen=True)
class Panel:
    """One panel. `draw` fills an empty figure of this size, in inches, without a title: page and PNG add one.

    `placed`: it places its axes itself, in the lowest `height` inches. There may be room above for the PNG's title.
    """

    name: Name | None
    draw: Callable[[FigureBase], None]
    width: float = 5.0
    height: float = 3.1
    placed: bool = False


@dataclass(frozen=True)
class Sheet:
    """One figure. `section`: of the page; `columns`: of the PNG; `folded`: the page shows it on demand, and there is no PNG."""

    file: str
    title: str
    caption: str
    section: str
    panels: tuple[Panel, ...]
    columns: int = 1
    folded: bool = False


@dataclass(frozen=True)
class Plot:
    """A written sheet: the PNG's path (None if folded), and the name and SVG of each panel."""

    title: str
    path: Path | None
    caption: str
    section: str
    panels: list[tuple[Name | None, str]]
    folded: bool = False


def write(sheet: Sheet, folder: Path) -> Plot:
    """Draw a sheet: `folder`/<file>.png unless it is folded, and its panels for the page."""
    path = None if sheet.folded else folder / f"{sheet.file}.png"
    if path:
        grid(sheet).savefig(path, dpi=_DPI)
    panels = [(panel.name, svg.inline(alone(panel), f"{sheet.file}_{number}")) for number, panel in enumerate(sheet.panels)]
    return Plot(sheet.title, path, sheet.caption, sheet.section, panels, sheet.folded)


def alone(panel: Panel) -> Figure:
    """A panel as a figure of its own, as on the page."""
    figure = Figure(figsize=(panel.width, panel.height), layout=None if panel.placed else "constrained")
    panel.draw(figure)
    return figure


def grid(sheet: Sheet) -> Figure:
    """All panels with their titles, as in the PNG."""
    columns = min(sheet.columns, len(sheet.panels))
    rows = math.ceil(len(sheet.panels) / columns)
    first = sheet.panels[0]
    height = first.height + (_HEAD if first.name else 0.0)
    figure = Figure(figsize=(columns * first.width, _HEAD + rows * height), layout=None if first.placed else "constrained")
    head, *cells = figure.subfigures(rows + 1, 1, height_ratios=[_HEAD, *[height] * rows])
    head.text(0.08 / (columns * first.width), 0.5, sheet.title, va="center", fontsize=11, fontweight="bold", parse_math=False)
    parts = [part for cell in cells for part in cell.subfigures(1, columns, squeeze=False).flat]
    for panel, part in zip(sheet.panels, parts, strict=False):
        if panel.name:
            # the layout makes no room for axes with a fixed position
            place = {"y": 1 - 0.1 / height, "va": "top"} if panel.placed else {}
            part.suptitle(str(panel.name), x=0.08 / panel.width, ha="left", fontsize=10, fontweight="normal", **place)
        panel.draw(part)
    return figure
