"""What the figures of a study share: colours, names, units and a legend."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ngpt.analysis import drawing, formats
from ngpt.analysis.sheets import Name

_GPT, _NGPT = drawing.COLORS[1], drawing.COLORS[0]
ARCHITECTURES = {"gpt": "GPT", "ngpt": "nGPT"}
Results = Mapping[str, Any]
RowLike = Mapping[str, Any]


def color_of(arm: str) -> str:
    """An arm's colour: one per architecture."""
    return _GPT if arm.startswith("gpt") else _NGPT


def unit_of(results: Results, comparison: str) -> str:
    """The unit of a comparison's numbers, in words."""
    one = results["study"]["comparisons"][comparison]
    unit = results["study"]["measures"][one["measure"]]["unit"]
    return {
        "ratio": "ratio",
        "optimum": "doublings" if one["less"] else f"log2 of {one['over']}",
        "slope": f"{unit} per doubling" if unit else "per doubling",
        "reach": "part of the reference's tokens",
    }.get(one["kind"], "%" if one["relative"] else unit)


def row_name(row: Mapping[str, Any]) -> str:
    point = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row["point"].items())
    return f"{row['label']}{f' ({point})' if point else ''}"


def title_of(results: Results, figure: Mapping[str, Any], comparison: str) -> Name | None:
    """The title of a panel; None if the figure's own title says it."""
    return Name(results["study"]["comparisons"][comparison]["title"]) if len(figure["of"]) > 1 else None


def legend(axes: Axes, names: Sequence[tuple[str, str, Any]]) -> None:
    """Draws a legend above the axes. `names`: (name, colour, line style) of each entry."""
    handles = [Line2D([], [], color=color, linestyle=style, linewidth=2, label=formats.short(name, 44)) for name, color, style in names]
    made = axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.3, fontsize=8.5, labelspacing=0.25)
    for text in made.get_texts():
        text.set_parse_math(False)
