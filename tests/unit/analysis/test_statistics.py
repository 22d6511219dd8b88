"""Intervals against tables, other computations of the same, and simulations with a known truth."""

import math

import mpmath  # comes with torch, by way of sympy
import numpy as np
import pytest

from ngpt.analysis import statistics
from ngpt.analysis.distributions import chi_squared_cumulative, chi_squared_quantile, t_cumulative, t_quantile
from ngpt.analysis.intervals import ALL, BETWEEN, OUTSIDE, Interval
from ngpt.analysis.statistics import (
    bootstrap_interval,
    fieller,
    mean_interval,
    paired_difference,
    pairs_needed,
    ratio_of_means,
    slope,
    vertex,
    vertex_shift,
    within_noise,
)

TRIALS = 1000
# Of 1,000 intervals that cover 95 %, between 92.7 and 97.3 % hold the truth in all but one of a thousand simulations.
COVERED = (0.927, 0.973)


def coverage(truth: float, make, seed: int = 0) -> float:
    random = np.random.default_rng(seed)
    return np.mean([make(random).holds(truth) for _ in range(TRIALS)])


# NIST/SEMATECH e-Handbook of Statistical Methods, tables 1.3.6.7.2 and 1.3.6.7.4 (three digits behind the point).
@pytest.mark.parametrize(
    ("probability", "degrees", "table"),
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 3, 3.182), (0.95, 7, 1.895), (0.99, 10, 2.764), (0.975, 100, 1.984)],
)
def test_t_quantile_is_that_of_the_table(probability, degrees, table):
    assert t_quantile(probability, degrees) == pytest.approx(table, abs=5e-4)
    assert t_quantile(1 - probability, degrees) == pytest.approx(-table, abs=5e-4)


@pytest.mark.parametrize(
    ("probability", "degrees", "table"), [(0.025, 2, 0.051), (0.975, 2, 7.378), (0.025, 9, 2.700), (0.975, 9, 19.023), (0.95, 50, 67.505)]
)
def test_chi_squared_quantile_is_that_of_the_table(probability, degrees, table):
    assert chi_squared_quantile(probability, degrees) == pytest.approx(table, abs=5e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 40, 1001])
def test_distributions_are_the_integrals_of_their_densities(degrees):
    for place in (0.3, 1.7, 6.0):
        in_beta = mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + place**2), regularized=True)
        assert t_cumulative(place, degrees) == pytest.approx(float(1 - in_beta / 2), abs=1e-11)
        in_gamma = mpmath.gammainc(degrees / 2, 0, place * degrees / 2, regularized=True)
        assert chi_squared_cumulative(place * degrees, degrees) == pytest.approx(float(in_gamma), abs=1e-11)


def test_mean_interval_is_that_of_a_worked_example():
    # NIST/SEMATECH e-Handbook, 1.3.5.2: 195 values of mean 9.26146 and deviation 0.022789 have the interval 9.258242 to 9.264679.
    spread = np.tile([-1.0, 0.0, 1.0], 65)
    values = 9.26146 + 0.022789 * spread / spread.std(ddof=1)
    found = mean_interval(values)
    assert (found.low, found.high) == (pytest.approx(9.258242, abs=2e-6), pytest.approx(9.264679, abs=2e-6))


@pytest.mark.parametrize("units", [2, 3, 9])
def test_mean_interval_covers_what_it_claims(units):
    assert COVERED[0] < coverage(5.0, lambda random: mean_interval(random.normal(5.0, 2.0, units))) < COVERED[1]


def test_one_unit_excludes_nothing_nor_do_units_that_agree_exactly():
    for values in ([3.0], [3.0] * 4):
        found = mean_interval(values)
        assert (found.estimate, found.shape, found.bounded, found.holds(-1e9)) == (3.0, ALL, False, True)


def test_pairing_takes_out_what_units_have_in_common():
    def pairs(random):
        common = random.normal(0, 100, 3)
        return paired_difference(common + random.normal(1, 0.1, 3), common + random.normal(0, 0.1, 3))

    assert COVERED[0] < coverage(1.0, pairs) < COVERED[1]
    assert pairs(np.random.default_rng(1)).high < 5
    with pytest.raises(ValueError, match="2 values are paired with 3"):
        paired_difference([1, 2], [1, 2, 3])


# The divisor is 8, 2 and 0.3 standard errors from zero: sets with ends, mixed ones, and mostly without.
@pytest.mark.parametrize(("divisor", "bounded"), [(8.0, (0.6, 1.0)), (2.0, (0.1, 0.35)), (0.3, (0.03, 0.1))])
def test_fiellers_sets_cover_what_they_claim_where_the_divisor_is_near_zero(divisor, bounded):
    shapes = []

    def ratio(random):
        common = random.normal(0, 1, 3)
        y = divisor / math.sqrt(3) + 0.6 * common + 0.8 * random.normal(0, 1, 3)
        x = 0.7 * divisor / math.sqrt(3) + 0.8 * common + 0.6 * random.normal(0, 1, 3)
        shapes.append((found := ratio_of_means(x, y)).bounded)
        return found

    assert COVERED[0] < coverage(0.7, ratio) < COVERED[1]
    assert bounded[0] < np.mean(shapes) < bounded[1]


def test_a_ratio_is_possible_exactly_where_the_mean_difference_may_be_zero():
    random = np.random.default_rng(3)
    shapes = set()
    for _ in range(60):
        x, y = random.normal(0.5, 1, 4), random.normal(0.7, 1, 4)
        found = ratio_of_means(x, y)
        shapes.add(found.shape)
        for ratio in (-30, -3, -1, 0, 0.2, 0.7, 1, 3, 30):
            assert found.holds(ratio) == mean_interval(x - ratio * y).holds(0.0)
    assert shapes == {BETWEEN, OUTSIDE, ALL}


def test_a_divisor_on_the_edge_of_zero_leaves_one_end():
    found = fieller(x=2.0, y=1.0, s_xx=0.1, s_xy=0.0, s_yy=1.0, quantile=1.0, units=3, method="")
    assert (found.low, found.high) == (pytest.approx((4 - 0.1) / 4), math.inf)


def test_bootstrap_is_refused_where_it_is_too_narrow():
    with pytest.raises(ValueError, match="a bootstrap of 7 units"):
        bootstrap_interval(np.ones(7), lambda samples: samples.mean(axis=1))
    random = np.random.default_rng(5)
    found = bootstrap_interval(random.normal(2, 1, 400), lambda samples: samples.mean(axis=1))
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20, rel=0.08)


def test_pairs_needed_is_what_the_half_width_takes():
    differences = [0.01, 0.03, -0.01, 0.02, 0.0]
    found = pairs_needed(differences, 0.005)
    scatter, count = np.std(differences, ddof=1), int(found.estimate)
    widths = [t_quantile(0.975, n - 1) * scatter / math.sqrt(n) for n in (count - 1, count)]
    assert widths[1] <= 0.005 < widths[0]
    # chi-squared of 4 degrees, 2.5 and 97.5 %: 0.484 and 11.143 (NIST/SEMATECH e-Handbook, table 1.3.6.7.4)
    narrow, wide = scatter * math.sqrt(4 / 11.143), scatter * math.sqrt(4 / 0.484)
    for scatter, found_count in ((narrow, found.low), (wide, found.high)):
        assert t_quantile(0.975, int(found_count) - 1) * scatter / math.sqrt(found_count) == pytest.approx(0.005, rel=0.08)
    assert pairs_needed([0.0, 1.0], 1e-3).estimate == pytest.approx((1.96 / math.sqrt(2) / 1e-3) ** 2, rel=3e-3)


def test_slope_covers_what_it_claims_and_two_points_exclude_nothing():
    widths = np.log2([256, 512, 1024, 2048])
    assert COVERED[0] < coverage(3.0, lambda random: slope(widths, 3 * widths + random.normal(0, 2, 4))) < COVERED[1]
    assert slope([0, 1], [0, 2]).shape == ALL
    # by hand: slope = 4 / 5, residuals with squares of sum 1.8, 2 degrees of freedom, error = sqrt(1.8 / 2 / 5)
    x, y = np.array([1.0, 2, 3, 4]), np.array([2.0, 3, 5, 4])
    found = slope(x, y)
    assert (found.estimate, found.high) == (pytest.approx(0.8), pytest.approx(0.8 + 4.302653 * math.sqrt(1.8 / 2 / 5)))


@pytest.mark.parametrize("scatter", [0.05, 1.0], ids=["clear", "hardly a parabola"])
def test_vertex_covers_what_it_claims(scatter):
    rates = np.arange(-2, 3) / 2
    shapes = []

    def lowest(random):
        shapes.append((found := vertex(rates - 9, (rates - 0.3) ** 2 + random.normal(0, scatter, 5))).bounded)
        return found

    assert COVERED[0] < coverage(0.3 - 9, lowest) < COVERED[1]
    assert (np.mean(shapes) > 0.95) == (scatter == 0.05)


def test_a_vertex_is_possible_exactly_where_the_slope_may_be_zero():
    rates = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 4.5])  # not symmetric: slope and curvature err together
    for scatter in (0.3, 3.0):
        for noise in np.random.default_rng(1).normal(0, scatter, (10, 6)):
            losses = (rates - 1.7) ** 2 + noise
            found = vertex(rates, losses)
            for place in (-5.0, 0.5, 1.2, 1.6, 1.8, 2.2, 3.0, 9.0):
                coefficients, covariance = np.polyfit(rates - place, losses, 2, cov=True)
                assert found.holds(place) == (abs(coefficients[1]) <= t_quantile(0.975, 3) * math.sqrt(covariance[1, 1]))


def test_shift_of_vertices_covers_what_it_claims_and_a_hill_has_none():
    rates = np.arange(-2, 3) / 2
    curves = [(rates - place) ** 2 for place in (0.4, 0.3)]

    def shift(random):
        common = random.normal(0, 0.2, (3, 1)) * rates
        return vertex_shift(rates, *(curve + common + random.normal(0, 0.03, (3, 5)) for curve in curves))

    assert COVERED[0] < coverage(0.1, shift) < COVERED[1]
    hill = vertex_shift(rates, [-curves[0]] * 3, [curves[1]] * 3)
    assert math.isnan(hill.estimate) and hill.shape == ALL


def test_intervals_survive_json_and_answer_questions():
    between, outside = Interval(2.0, 1.0, 3.0, 3, ""), Interval(2.0, -1.0, 1.0, 3, "", OUTSIDE)
    assert between.lies_within(0, 4) and not between.lies_within(2, 4) and between.avoids(4, 5) and not between.avoids(2.5, 9)
    assert outside.holds(-2) and not outside.holds(0) and outside.avoids(-0.5, 0.5) and not outside.lies_within(-9, 9)
    for interval in (between, outside, mean_interval([1.0])):
        assert Interval.from_json(interval.to_json()) == interval
    assert mean_interval([1.0]).to_json()["high"] is None


@pytest.mark.parametrize("bad", [[], [1.0, math.nan]])
def test_no_statistic_is_made_of_values_that_are_none(bad):
    for statistic in (mean_interval, lambda values: pairs_needed(values, 1.0), lambda values: statistics.vertex(values, values)):
        with pytest.raises(ValueError, match="all of them finite"):
            statistic(bad)


def test_means_of_two_samples_are_within_the_noise_as_often_as_the_interval_says():
    random = np.random.default_rng(0)
    alike = np.mean([within_noise(random.normal(size=3), random.normal(size=2)) for _ in range(TRIALS)])
    assert COVERED[0] <= alike <= COVERED[1]
    assert not within_noise([1.0, 1.1, 0.9], [9.0]) and within_noise([1.0, 1.1, 0.9], [1.2])
    assert not within_noise([1.0], [1.1]) and not within_noise([1.0, 1.0], [1.1])  # nothing shows the noise
