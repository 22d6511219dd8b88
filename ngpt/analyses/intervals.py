"""95 % intervals of means: over independent batches, and over directions crossed with sequences.

An interval is a dict: value, lower and upper. Bounds are None where one value leaves them open, all three where a value is not finite.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
_TINY = 1e-300

type Interval = dict[str, float | None]


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values, with Student's t interval."""
    found = np.asarray(values, dtype=np.float64)
    if not found.size or not np.isfinite(found).all():
        return _interval(None, None)
    if found.size == 1:
        return _interval(float(found[0]), None)
    error = found.std(ddof=1) / math.sqrt(found.size)
    return _interval(float(found.mean()), t_quantile(found.size - 1) * float(error))


def crossed_interval(values_KS: np.ndarray) -> Interval:
    """Mean over K directions and S sequences, for others like these: both are drawn, and every direction meets every sequence.

    With the mean squares A of directions, B of sequences and E of what is left, the variance of the mean is (A + B - E) / KS, but not less
    than the larger of A and B over KS. Degrees of freedom by Satterthwaite.

    Args:
        values_KS: at least 2 by 2.

    Source: two-way random effects: Searle, Casella and McCulloch, "Variance Components" (1992), chapter 4; Satterthwaite, Biometrics
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
    return _interval(mean, t_quantile(freedom) * math.sqrt(total / values.size))


@functools.lru_cache
def t_quantile(freedom: float) -> float:
    """The value that |t| of Student's distribution exceeds with probability 1 - CONFIDENCE, to about 1e-12 of itself.

    Args:
        freedom: degrees of freedom, whole or not, above 0.
    """
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    t = 1.9  # below every such quantile: from there Newton's steps only rise, since the tail is convex
    for _ in range(100):
        beyond = incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))
        step = (beyond - (1 - CONFIDENCE)) / (2 * constant * (1 + t * t / freedom) ** (-(freedom + 1) / 2))
        t += step
        if abs(step) < 1e-13 * t:
            break
    return t


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b).

    Source: the continued fraction of DLMF 8.17.22, by Lentz's method.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - math.log(a) - math.lgamma(a) - math.lgamma(b) + math.lgamma(a + b))
    numerator, denominator, value = 1.0, 0.0, 1.0
    for step in range(1000):
        m = step // 2
        if step == 0:
            term = 1.0
        elif step % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        denominator = 1 / _not_zero(1 + term * denominator)
        numerator = _not_zero(1 + term / numerator)
        change = numerator * denominator
        value *= change
        if abs(change - 1) < 1e-15:
            break
    return front * (value - 1)


def _not_zero(number: float) -> float:
    return number if abs(number) > _TINY else _TINY


def _interval(value: float | None, margin: float | None) -> Interval:
    if value is None or margin is None:
        return {"value": value, "lower": None, "upper": None}
    return {"value": value, "lower": value - margin, "upper": value + margin}
