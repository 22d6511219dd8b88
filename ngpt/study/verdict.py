"""Whether a claim was reproduced, by a rule on intervals, never on an estimate alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ngpt.analysis.intervals import Interval
from ngpt.config.study import Rule, matching

REPRODUCED, NOT_REPRODUCED, UNDECIDED, NOT_JUDGED = "reproduced", "not reproduced", "undecided", "not judged"
_IN_WORDS = {"be_above": "above {0:g}", "be_below": "below {0:g}", "stay_within": "between -{0:g} and {0:g}"}


def judged(rule: Rule, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Applies a rule to the rows of its comparison (as in the results).

    A row holds if its whole interval satisfies the rule, is contrary if its whole interval violates it, and otherwise is open.

    Returns:
        result, the rule in words, and one line per row.
    """
    wanted = set(matching([row["arm"] for row in rows], rule.arms))
    found = [(row, _of_interval(rule, Interval.from_json(row["interval"]))) for row in rows if row["arm"] in wanted]
    words = in_words(rule.must, rule.value)
    return {
        "result": together([result for _, result in found]),
        "rule": f"reproduced if the whole interval is {words}; not reproduced if none of it is; else undecided",
        "comparison": rule.comparison,
        "rows": [{"arm": row["arm"], "label": row["label"], "point": row["point"], "result": result} for row, result in found],
    }


def in_words(must: str, value: float) -> str:
    """Where an interval has to lie."""
    return _IN_WORDS[must].format(value)


def _of_interval(rule: Rule, interval: Interval) -> str:
    holds, breaks = {
        "be_above": ((_above(rule.value), math.inf), (-math.inf, rule.value)),
        "be_below": ((-math.inf, _below(rule.value)), (rule.value, math.inf)),
        "stay_within": ((-rule.value, rule.value), None),
    }[rule.must]
    if interval.lies_within(*holds):
        return REPRODUCED
    contrary = interval.avoids(*holds) if breaks is None else interval.lies_within(*breaks)
    return NOT_REPRODUCED if contrary else UNDECIDED


def together(results: Sequence[str]) -> str:
    """One contrary result refutes the claim. All must hold to reproduce it."""
    if NOT_REPRODUCED in results:
        return NOT_REPRODUCED
    return REPRODUCED if results and all(result == REPRODUCED for result in results) else UNDECIDED


def _above(value: float) -> float:
    return math.nextafter(value, math.inf)


def _below(value: float) -> float:
    return math.nextafter(value, -math.inf)
