"""Student's t distribution, and the chi-squared distribution with whole degrees of freedom."""

import functools
import math
from collections.abc import Callable

_TINY = 1e-300


@functools.cache
def t_quantile(probability: float, degrees: float) -> float:
    """The quantile of Student's t distribution at `probability`.

    Args:
        probability: above 0 and below 1.
        degrees: degrees of freedom, 1 or more, not necessarily whole.

    Returns:
        The quantile, to ten digits or more.

    Raises:
        ValueError: an argument is outside its range.
    """
    _check(probability, degrees)
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    angle = _root(lambda theta: _t_cumulative_at(theta, degrees) - probability, 0.0, math.pi / 2)
    return math.sqrt(degrees) * math.tan(angle)


def t_cumulative(t: float, degrees: float) -> float:
    """Probability that Student's t is at most `t`."""
    _check(0.5, degrees)
    return _t_cumulative_at(math.atan(t / math.sqrt(degrees)), degrees)


def _t_cumulative_at(theta: float, degrees: float) -> float:
    """The same as a function of theta = atan(t / sqrt(degrees))."""
    beyond = incomplete_beta(degrees / 2, 0.5, math.cos(theta) ** 2)  # probability of both tails
    return 1 - beyond / 2 if theta > 0 else beyond / 2


def chi_squared_cumulative(x: float, degrees: int) -> float:
    """Probability that chi-squared is at most `x`.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.4.4 and 26.4.5.
    """
    _check(0.5, degrees)
    if x <= 0:
        return 0.0
    half = x / 2
    odd = degrees % 2
    power = odd / 2
    total, term = 0.0, math.exp(-half + power * math.log(half) - math.lgamma(power + 1))
    for _ in range(degrees // 2):
        total += term
        power += 1
        term *= half / power
    return (math.erf(math.sqrt(half)) if odd else 1.0) - total


@functools.cache
def chi_squared_quantile(probability: float, degrees: int) -> float:
    """The quantile of chi-squared at `probability`. Arguments, precision and errors as in `t_quantile`."""
    _check(probability, degrees)
    high = float(degrees)
    while chi_squared_cumulative(high, degrees) < probability:
        high *= 2
    return _root(lambda x: chi_squared_cumulative(x, degrees) - probability, 0.0, high)


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """The zero of an increasing function, by bisection to the last bit."""
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)


def _check(probability: float, degrees: float) -> None:
    if not 0 < probability < 1:
        raise ValueError(f"a probability of {probability}: it must be above 0 and below 1")
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom: there must be 1 or more")


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
