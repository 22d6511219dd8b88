"""The verdict of a study as its page says it: the rules that gave it, and the numbers that they judge."""

from collections.abc import Mapping, Sequence
from typing import Any

from ngpt.analysis.intervals import ALL, Interval
from ngpt.study.cells import estimate_cells, estimate_heads, table_row
from ngpt.study.drawing import Results
from ngpt.study.verdict import NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, UNDECIDED, in_words


def verdict_reason(results: Results) -> str:
    """Which rules gave the verdict, and of which scanned values it speaks: a size may have a part of those that the claim is about."""
    result, rules = results["verdict"]["result"], results["verdict"]["rules"]
    if result == NOT_JUDGED:
        return f"Size {results['size']} has no verdict. {results['study']['sizes'][results['size']]['says']}".strip()
    if not rules:
        return "The study has no rule."
    return f"{_of_rules(results, result, rules)}{_places(rules)}"


def _of_rules(results: Results, result: str, rules: Sequence[Mapping[str, Any]]) -> str:
    if result == REPRODUCED:
        return "Its rule holds." if len(rules) == 1 else f"All {len(rules)} rules hold."
    word, titles = {NOT_REPRODUCED: "contrary", UNDECIDED: "undecided"}[result], _titles(results, result)
    if len(rules) == 1:
        return f"Its rule is {word}: {titles[0]}."
    return f"{len(titles)} of {len(rules)} rules {'is' if len(titles) == 1 else 'are'} {word}: {'; '.join(titles)}."


def _places(rules: Sequence[Mapping[str, Any]]) -> str:
    """A sentence with the scanned values that rules judge; empty if they judge none."""
    points = [row["point"] for rule in rules for row in rule["rows"]]
    found = []
    for key in dict.fromkeys(key for point in points for key in point):
        *others, last = dict.fromkeys(str(point[key]) for point in points if key in point)
        values = f"{', '.join(others)} and {last}" if others else f"{last} alone"
        found.append(f"{key.rpartition('.')[2]} {values}")
    return f" It speaks of {'; '.join(found)}." if found else ""


def _titles(results: Results, result: str) -> list[str]:
    return [_title(results, rule) for rule in results["verdict"]["rules"] if rule["result"] == result]


def _title(results: Results, judged: Mapping[str, Any]) -> str:
    """A rule's comparison, and the arms if it judges a part of them."""
    name = judged["comparison"]
    title, labels = results["study"]["comparisons"][name]["title"] or name, dict.fromkeys(row["label"] for row in judged["rows"])
    others = {row["label"] for row in results["comparisons"][name]["rows"]} - set(labels)
    return f"{title} ({'; '.join(labels)})" if others and labels else title


def verdict_tables(results: Results) -> list[dict[str, Any]]:
    """The rules, each with the numbers that it judges: estimate, interval, how many seeds, and what follows."""
    found = []
    for rule, judged in zip(results["study"]["verdict"], results["verdict"]["rules"], strict=True):
        name, place = judged["comparison"], in_words(rule["must"], rule["value"])
        of_rows = {_key(row): row["result"] for row in judged["rows"]}
        rows = [(row, of_rows[_key(row)]) for row in results["comparisons"][name]["rows"] if _key(row) in of_rows]
        lines = [[*estimate_cells(row), str(len(row["by_seed"])), _judged(row, result, place)] for row, result in rows]
        found.append(
            {
                "title": _title(results, judged),
                "says": results["study"]["comparisons"][name]["says"],
                "result": judged["result"],
                "rule": judged["rule"],
                "heads": [*estimate_heads(results, name), "seeds", "result"],
                "rows": [table_row(results, row, line) for (row, _), line in zip(rows, lines, strict=True)],
            }
        )
    return found


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["arm"], *row["point"].items())


def _judged(row: Mapping[str, Any], result: str, place: str) -> str:
    """What a rule says of a row, and why."""
    if result != UNDECIDED:
        return f"{result}: {'all' if result == REPRODUCED else 'none'} of the interval is {place}"
    if not row["by_seed"]:
        return f"{result}: no seed has the numbers"
    if Interval.from_json(row["interval"]).shape == ALL:
        return f"{result}: the interval excludes nothing"
    return f"{result}: one part of the interval is {place}, another is not"
