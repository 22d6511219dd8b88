"""Intervals: quantiles against integrated densities, and how often they hold a truth that is known."""

import math

import numpy as np
import pytest

from ngpt.analysis.distributions import t_quantile
from ngpt.model_analysis.intervals import crossed_interval, text_interval

SETS = 400
ERROR = math.sqrt(0.95 * 0.05 / SETS)  # of a measured coverage


@pytest.mark.parametrize("freedom", [1, 2, 3.7, 7, 40, 1000])
def test_quantiles_leave_a_twentieth_of_the_integrated_density(freedom):
    # in t = tan(angle), so that the tails end; the density of Student's distribution without its constant
    angle = np.linspace(-math.pi / 2, math.pi / 2, 400_001)[1:-1]
    t = np.tan(angle)
    density = (1 + t**2 / freedom) ** (-(freedom + 1) / 2) * (1 + t**2)
    outside = density[np.abs(t) > t_quantile(0.975, freedom)].sum() / density.sum()
    assert outside == pytest.approx(0.05, abs=2e-5)


def coverage(intervals: list[dict], truth: float) -> float:
    return sum(found["lower"] <= truth <= found["upper"] for found in intervals) / len(intervals)


def test_means_of_few_values_are_held_as_often_as_claimed():
    values = np.random.RandomState(1).normal(3, 2, (SETS, 4))
    assert coverage([text_interval(row) for row in values], 3) == pytest.approx(0.95, abs=3 * ERROR)


# Standard deviations of what directions, sequences and single pairs add.
@pytest.mark.parametrize("spreads", [(1, 0, 0.1), (0, 1, 0.1), (1, 1, 0.5), (0.2, 0.2, 1), (0.05, 0.02, 1)])
def test_directions_crossed_with_sequences_are_held_as_often_as_claimed(spreads):
    random, shape = np.random.RandomState(2), (6, 8)
    direction, sequence, pair = spreads
    sets = [
        5 + direction * random.normal(size=(shape[0], 1)) + sequence * random.normal(size=(1, shape[1])) + pair * random.normal(size=shape)
        for _ in range(SETS)
    ]
    held = coverage([crossed_interval(values) for values in sets], 5)
    assert 0.95 - 3 * ERROR < held < 0.995  # small components are overestimated, and the interval is the wider for it
    if max(direction, sequence) == 1:  # pairs are not independent values, and taken for such they are held far too seldom
        assert coverage([text_interval(values.ravel()) for values in sets], 5) < 0.75


def test_what_cannot_be_said_is_left_open():
    assert text_interval([2.0]) == {"value": 2.0, "lower": None, "upper": None}
    assert text_interval([1.0, math.inf])["value"] is None and text_interval([])["value"] is None
    assert crossed_interval(np.ones((1, 3))) == {"value": 1.0, "lower": None, "upper": None}
    same = crossed_interval(np.full((3, 4), 0.5))
    assert same == {"value": 0.5, "lower": 0.5, "upper": 0.5}
