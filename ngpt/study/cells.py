"""Numbers of a study's results, as shown in the tables of its page."""

from collections.abc import Mapping
from typing import Any

from ngpt.analysis import formats
from ngpt.analysis.intervals import ALL, OUTSIDE, Interval
from ngpt.config.study import BRANCH, SEED
from ngpt.study.drawing import row_name, unit_of

_DIGITS = 4
Results = Mapping[str, Any]


def number(value: float | None) -> str:
    return formats.MISSING if value is None or value != value else f"{value:.{_DIGITS}g}"


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


def design_rows(results: Results) -> list[tuple[str, str]]:
    """What was run, as rows of a table."""
    study, runs = results["study"], results["runs"]
    seeds, branches = study["lists"][SEED], study["lists"].get(BRANCH, [])
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    scans = {key: list(dict.fromkeys(run["point"][key] for run in runs if key in run["point"])) for run in runs for key in run["point"]}
    tokens = [run["tokens"] for run in runs if run["tokens"] and study["arms"][run["arm"]]["until"] is None]
    lengths = " to ".join(formats.count(value) for value in sorted({min(tokens), max(tokens)})) if tokens else formats.MISSING
    trunks = [name for name in arms if study["arms"][name]["until"] is not None]
    rows = [
        ("Size", f"{results['size']}: {study['sizes'][results['size']]['says']}"),
        ("Arms", ", ".join(arms)),
        *((f"Scan of {key}", ", ".join(map(str, values))) for key, values in scans.items()),
        ("Seeds", f"{len(seeds)}: {', '.join(map(str, seeds))}. A seed sets initial weights and data order, alike in all arms"),
        ("Tokens of a run", lengths),
    ]
    if trunks:
        parts = ", ".join(f"{name} at {study['arms'][name]['until']:.0%} of the steps" for name in trunks)
        each = f"{len(branches)} of each trunk, which differ in their data order. " if branches else ""
        rows.append(("Branches", f"{each}Arms continue the checkpoint of {parts}, with its optimizer state"))
    return [*rows, ("Tuning effort", study["tuning"]), *([("Left out", study["left_out"])] if study["left_out"] else [])]


def comparison_tables(results: Results) -> list[dict[str, Any]]:
    """The comparisons that have rows, each with its headings and cells."""
    found = []
    for name, comparison in results["study"]["comparisons"].items():
        rows = results["comparisons"][name]["rows"]
        if not rows:
            continue
        seeds = list(dict.fromkeys(seed for row in rows for seed in row["by_seed"]))
        measure = results["study"]["measures"][comparison["measure"]]
        found.append(
            {
                "title": comparison["title"] or name,
                "says": " ".join(part for part in (comparison["says"], measure["says"]) if part),
                "method": rows[0]["interval"]["method"],
                "heads": [unit_of(results, name) or "value", "95 % interval", *(f"seed {seed}" for seed in seeds), "seeds to tell from 0"],
                "rows": [_cells(row, seeds, results["study"]["arms"]) for row in rows],
            }
        )
        if not any(row["pairs"] for row in rows):
            found[-1]["heads"].pop()
            for row in found[-1]["rows"]:
                row["cells"].pop()
    return found


def _cells(row: Mapping[str, Any], seeds: list[str], arms: Mapping[str, Any]) -> dict[str, Any]:
    cells = [number(row["interval"]["estimate"]), interval_text(row["interval"]), *(number(row["by_seed"].get(seed)) for seed in seeds)]
    others = {"less": row["less"], "over": row["divided_by"]}
    against = [f"{word} {arms[arm]['label'] or arm}" for word, arm in others.items() if arm]
    return {"name": row_name(row), "against": ", ".join(against), "note": row["note"], "cells": [*cells, _pairs(row["pairs"])]}


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
