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


def has_number(row: RowLike) -> bool:
    return row["interval"]["estimate"] is not None


def left_out(results: Results, figure: Mapping[str, Any]) -> str:
    """Sentences that name the arms that a figure would show, had they a number, and why they have none."""
    sentences = []
    for name in figure["of"]:
        rows = [(row, _is_shown(results, figure, name, row)) for row in _of_figure(results, figure, name)]
        seen = {row["arm"] for row, is_shown in rows if is_shown}
        by_note: dict[str, list[str]] = {}
        for row in (row for row, is_shown in rows if not is_shown):
            by_note.setdefault(row["note"] or "no number", []).append(row_name(row) if row["arm"] in seen else row["label"])
        of = f" of “{results['study']['comparisons'][name]['title'] or name}”" if len(figure["of"]) > 1 else ""
        if by_note:
            sentences += [f"Left out{of}:", *(f"{'; '.join(dict.fromkeys(names))}: {note}." for note, names in by_note.items())]
    return " ".join(sentences)


def _of_figure(results: Results, figure: Mapping[str, Any], name: str) -> list[RowLike]:
    """The rows of a comparison that a figure is about."""
    rows = results["comparisons"][name]["rows"]
    if figure["kind"] == "axis":
        return [row for row in rows if figure["over"] in row["point"]]
    return list({row["arm"]: row for row in rows}.values()) if figure["kind"] == "layers" else rows


def _is_shown(results: Results, figure: Mapping[str, Any], name: str, row: RowLike) -> bool:
    if figure["kind"] == "layers":
        measure = results["study"]["comparisons"][name]["measure"]
        return any(run["layers"].get(measure) for run in results["runs"] if (run["arm"], run["point"]) == (row["arm"], row["point"]))
    if figure["kind"] != "tokens":
        return has_number(row)
    curves = results["comparisons"][name].get("curves", [])
    return any(curve["places"] and (curve["arm"], curve["point"]) == (row["arm"], row["point"]) for curve in curves)


def title_of(results: Results, figure: Mapping[str, Any], comparison: str) -> Name | None:
    """The title of a panel; None if the figure's own title says it."""
    return Name(results["study"]["comparisons"][comparison]["title"]) if len(figure["of"]) > 1 else None


def legend(axes: Axes, names: Sequence[tuple[str, str, Any]]) -> None:
    """Draws a legend above the axes. `names`: (name, colour, line style) of each entry."""
    handles = [Line2D([], [], color=color, linestyle=style, linewidth=2, label=formats.short(name, 44)) for name, color, style in names]
    made = axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.3, fontsize=8.5, labelspacing=0.25)
    for text in made.get_texts():
        text.set_parse_math(False)
