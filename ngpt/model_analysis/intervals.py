"""95 % confidence intervals of means: over independent samples of text, and over directions crossed with sequences.

An interval is a dict, as the JSON of an analysis holds it: value, lower and upper. The bounds are None for a single value. All three are
None if a value is not finite. Intervals over seeds, which may have no end, are in ngpt/analysis/statistics.py.
"""

import math
from collections.abc import Sequence

import numpy as np

from ngpt.analysis.distributions import t_quantile
from ngpt.analysis.intervals import CONFIDENCE
from ngpt.analysis.statistics import half_width

_TINY = 1e-300

type Interval = dict[str, float | None]


def text_interval(values: Sequence[float]) -> Interval:
    """The mean over independent batches or sequences of text, with Student's t interval. Equal values have one of no width."""
    found = np.asarray(values, dtype=np.float64)
    if not found.size or not np.isfinite(found).all():
        return _interval(None, None)
    if found.size == 1:
        return _interval(float(found[0]), None)
    return _interval(float(found.mean()), half_width(found))


def crossed_interval(values_KS: np.ndarray) -> Interval:
    """The mean over K directions and S sequences. Both are random effects, and every direction meets every sequence.

    With the mean squares A of directions, B of sequences and E of the residual, the variance of the mean is (A + B - E) / KS, but at least
    max(A, B) / KS. Degrees of freedom by Satterthwaite.

    Args:
        values_KS: at least 2 by 2.

    Source: Searle, Casella and McCulloch, "Variance Components" (1992), chapter 4 (two-way random effects); Satterthwaite, Biometrics
        Bulletin 2 (1946).
    """
    values = np.asarray(values_KS, dtype=np.float64)
    if not np.isfinite(values).all():
        return _interval(None, None)
    mean = float(values.mean())
    directions, sequences = values.shape
    if min(directions, sequences) < 2:
        return _interval(mean, None)
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    left = values - rows[:, None] - columns[None] + mean
    squares = np.array([sequences * rows.var(ddof=1), directions * columns.var(ddof=1)])
    freedoms = np.array([directions - 1.0, sequences - 1.0])
    rest, rest_freedom = float((left**2).sum() / freedoms.prod()), float(freedoms.prod())
    total = max(float(squares.sum()) - rest, float(squares.max()))
    freedom = total**2 / max(float((squares**2 / freedoms).sum()) + rest**2 / rest_freedom, _TINY)
    freedom = min(max(freedom, float(freedoms.min())), rest_freedom)
    return _interval(mean, t_quantile((1 + CONFIDENCE) / 2, freedom) * math.sqrt(total / values.size))


def _interval(value: float | None, margin: float | None) -> Interval:
    if value is None or margin is None:
        return {"value": value, "lower": None, "upper": None}
    return {"value": value, "lower": value - margin, "upper": value + margin}
