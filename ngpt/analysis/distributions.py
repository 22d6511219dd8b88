"""Student's t and chi-squared distributions of whole degrees of freedom, from their finite sums."""

import functools
import math
from collections.abc import Callable


@functools.cache
def t_quantile(probability: float, degrees: int) -> float:
    """Where Student's t distribution reaches `probability`.

    Args:
        probability: above 0 and below 1.
        degrees: of freedom, 1 or more.

    Returns:
        To ten digits or more, up to 20,000 degrees.

    Raises:
        ValueError: an argument outside its range.
    """
    _check(probability, degrees)
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    angle = _root(lambda theta: _t_cumulative_at(theta, degrees) - probability, 0.0, math.pi / 2)
    return math.sqrt(degrees) * math.tan(angle)


def t_cumulative(t: float, degrees: int) -> float:
    """Probability that Student's t is at most `t`.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    _check(0.5, degrees)
    return _t_cumulative_at(math.atan(t / math.sqrt(degrees)), degrees)


def _t_cumulative_at(theta: float, degrees: int) -> float:
    """The same by theta = atan(t / sqrt(degrees)): both tails are sums of powers of the cosine."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    # Each term is the one before it times cos^2 and a fraction: 2/3, 4/5, ... for odd degrees, 1/2, 3/4, ... for even ones.
    term, total = (cosine if odd else 1.0), 0.0
    for index in range(1 + odd, degrees, 2):
        total += term
        term *= cosine * cosine * index / (index + 1)
    within = (theta + sine * total) * 2 / math.pi if odd else sine * total
    return 0.5 + within / 2


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
    """Where chi-squared reaches `probability`. Arguments, precision and errors as `t_quantile`."""
    _check(probability, degrees)
    high = float(degrees)
    while chi_squared_cumulative(high, degrees) < probability:
        high *= 2
    return _root(lambda x: chi_squared_cumulative(x, degrees) - probability, 0.0, high)


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function is zero, by bisection to the last bit."""
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)


def _check(probability: float, degrees: int) -> None:
    if not 0 < probability < 1:
        raise ValueError(f"a probability of {probability}: it must be above 0 and below 1")
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom: there must be 1 or more")
