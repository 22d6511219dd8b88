"""Numbers of a study's results, as shown in the tables of its page."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ngpt.analysis import formats
from ngpt.analysis.intervals import ALL, BETWEEN, OUTSIDE, Interval
from ngpt.config.study import METRICS
from ngpt.study.comparisons import RATIO_HALF_WIDTH
from ngpt.study.drawing import row_name, unit_of

_DIGITS = 4
_WHOLE = 1e15  # a float has all digits of whole numbers below it
_TAKEN = {
    "last": "the last",
    "first": "the first",
    "mean": "the mean over the run of",
    "least": "the smallest",
    "largest": "the largest",
    "count": "how often a value is above {0:g} of",
    "spikes": "how many spikes there are of",
}
Results = Mapping[str, Any]


def number(value: float | None) -> str:
    """Four digits, with zeros at the end, but whole numbers below 1e15 as they are."""
    if value is None or value != value:
        return formats.MISSING
    if float(value).is_integer():
        return str(int(value)) if abs(value) < _WHOLE else f"{value:.{_DIGITS}g}"
    return f"{value:#.{_DIGITS}g}".rstrip(".")


def interval_text(values: Mapping[str, Any]) -> str:
    """An interval in words, which say so if it is unbounded."""
    one = Interval.from_json(dict(values))
    if one.shape == ALL:
        return "excludes nothing"
    if one.shape == OUTSIDE:
        return f"up to {number(one.low)}, and from {number(one.high)} on"
    if not one.bounded:
        return f"from {number(one.low)} on" if one.low > float("-inf") else f"up to {number(one.high)}"
    return f"{number(one.low)} to {number(one.high)}"


def unbounded_notes(results: Results) -> list[str]:
    """What the intervals without two ends mean: a sentence or two for each kind that the tables hold."""
    found = [Interval.from_json(row["interval"]) for one in results["comparisons"].values() for row in one["rows"] if row["by_seed"]]
    return [note for applies, note in _UNBOUNDED if any(map(applies, found))]


_UNBOUNDED: tuple[tuple[Callable[[Interval], bool], str], ...] = (
    (
        lambda one: one.shape == ALL,
        "“Excludes nothing”: the data give no bound, and the true value may be any. One seed shows no scatter, nor do seeds that agree "
        "exactly; nor has a ratio a bound whose dividend and divisor may both be zero.",
    ),
    (
        lambda one: one.shape == OUTSIDE,
        "“Up to A, and from B on”: only what lies between A and B is excluded. This happens to a ratio whose divisor may be zero, and to "
        "the lowest point of a parabola that may be flat, since the true value may then be large, with either sign.",
    ),
    (
        lambda one: one.shape == BETWEEN and not one.bounded,
        "“From A on” and “up to B” have one end: on the other side nothing is excluded.",
    ),
)


def comparison_tables(results: Results) -> list[dict[str, Any]]:
    """The comparisons that have rows, each with its headings and cells.

    One that repeats an earlier one, with the same rows of the same measure in the same unit, is left out unless a rule judges it.
    """
    found, shown = [], list[Any]()
    judged = {rule["comparison"] for rule in results["verdict"]["rules"]}
    for name, comparison in results["study"]["comparisons"].items():
        rows = results["comparisons"][name]["rows"]
        content = comparison["measure"], unit_of(results, name), rows
        if not rows or (content in shown and name not in judged):
            continue
        shown.append(content)
        measure = results["study"]["measures"][comparison["measure"]]
        found.append(
            {
                "title": comparison["title"] or name,
                "says": " ".join(part for part in (comparison["says"], measure["says"]) if part),
                "methods": "; ".join(dict.fromkeys(row["interval"]["method"] for row in rows if row["interval"]["shape"] != ALL)),
                "judged": name in judged,
                "seeds_for": _seeds_for(comparison)[1] if any(row["pairs"] for row in rows) else "",
            }
            | _source(results, measure)
            | _of_rows(results, name, rows)
        )
    return found


def _of_rows(results: Results, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Headings and rows of a table. Its last column, the seeds needed, is there if a row has them."""
    seeds = list(dict.fromkeys(seed for row in rows for seed in row["by_seed"]))
    heads, cells = [*estimate_heads(results, name), *(f"seed {seed}" for seed in seeds)], []
    for row in rows:
        cells.append([*estimate_cells(row), *(number(row["by_seed"].get(seed)) for seed in seeds)])
    if any(row["pairs"] for row in rows):
        heads.append(_seeds_for(results["study"]["comparisons"][name])[0])
        for row, line in zip(rows, cells, strict=True):
            line.append(_pairs(row["pairs"]))
    return {"heads": heads, "rows": [table_row(results, row, line) for row, line in zip(rows, cells, strict=True)]}


def _seeds_for(comparison: Mapping[str, Any]) -> tuple[str, str]:
    """Heading of the seeds needed, and what they are needed for."""
    if comparison["kind"] == "ratio":
        return f"seeds for ±{RATIO_HALF_WIDTH}", f"know the ratio to ±{RATIO_HALF_WIDTH}"
    return "seeds to tell from 0", "tell this difference from 0"


def _source(results: Results, measure: Mapping[str, Any]) -> dict[str, str]:
    """What is taken of which key, and in which file it is."""
    if measure["source"] != METRICS:
        what = results["study"]["analyses"][measure["source"]]["what"]
        return {"taken": "", "key": measure["key"], "file": f"the JSON of ngpt analyze {what}"}
    return {"taken": _TAKEN[measure["take"]].format(measure["above"]), "key": measure["key"], "file": "metrics.jsonl"}


def table_row(results: Results, row: Mapping[str, Any], cells: list[str]) -> dict[str, Any]:
    """A row with its name, what it is compared with, and what a reader must know of it."""
    arms = results["study"]["arms"]
    others = {"less": row["less"], "over": row["divided_by"]}
    against = [f"{word} {arms[arm]['label'] or arm}" for word, arm in others.items() if arm]
    return {"name": row_name(row), "against": "; ".join(against), "note": row["note"], "cells": cells}


def estimate_heads(results: Results, comparison: str) -> list[str]:
    """The headings of `estimate_cells`: the unit, and that of the interval."""
    return [unit_of(results, comparison) or "value", "95 % interval"]


def estimate_cells(row: Mapping[str, Any]) -> list[str]:
    """A row's estimate and its interval."""
    return [number(row["interval"]["estimate"]), interval_text(row["interval"]) if row["by_seed"] else formats.MISSING]


def _pairs(pairs: Mapping[str, Any] | None) -> str:
    if pairs is None:
        return ""
    return f"{pairs['estimate']:.0f} ({pairs['low']:.0f} to {pairs['high']:.0f})"


def run_rows(results: Results) -> list[dict[str, Any]]:
    """Every run with its command and its measured values."""
    return [
        {
            "name": run["name"],
            "status": run["status"],
            "command": run["command"],
            "measures": {name: number(value) for name, value in run["measures"].items()},
        }
        for run in results["runs"]
    ]
