"""Comparisons, verdicts and measures on numbers whose answer is known by hand."""

import math

import numpy as np
import pytest

from ngpt.analysis.intervals import ALL, Interval
from ngpt.config.study import Arm, Comparison, Measure, Rule, Study
from ngpt.study.comparisons import Values, curve, rows
from ngpt.study.numbers import Numbers, measured, phase_change
from ngpt.study.plan import PlannedRun
from ngpt.study.verdict import judged, together

T_2 = 4.302653  # Student's t, 97.5 %, of 2 degrees of freedom (NIST/SEMATECH e-Handbook, table 1.3.6.7.2: 4.303)
LESS = {"gpt_*": "gpt_bf16", "ngpt_*": "ngpt_bf16"}


def values(**losses) -> Values:
    """Losses by arm: a list over seeds, or a mapping of the rate to such lists; a curve of tokens is {tokens: loss} in place of a loss."""
    arms, numbers = {}, []
    for arm, given in losses.items():
        arms[arm] = Arm()
        for rate, of_seeds in (given if isinstance(given, dict) else {None: given}).items():
            for seed, loss in enumerate(of_seeds, start=1):
                point = {} if rate is None else {"optim.lr": rate}
                run = PlannedRun(f"{arm}/{rate}_{seed}", arm, point, seed, ())
                tokens = loss if isinstance(loss, dict) else {100.0: loss}
                last = {"loss": list(tokens.values())[-1]}
                numbers.append(Numbers(run, "finished", "", {}, values=last, curves={"val_loss": list(tokens.items())}))
    seeds = max(found.run.seed for found in numbers)
    return Values(Study("", "", "", arms=arms, lists={"seed": list(range(1, seeds + 1))}, measures={"loss": Measure("val_loss")}), numbers)


def only(found):
    (row,) = found
    return row


def test_a_difference_is_paired_by_seed_and_told_in_percent_where_asked():
    given = values(gpt_bf16=[1.0, 2.0, 4.0], gpt_x=[1.1, 2.2, 4.8])
    row = only(rows(Comparison("loss", less=LESS), given))
    assert (row.arm, row.less, row.interval.estimate) == ("gpt_x", "gpt_bf16", pytest.approx(1.1 / 3))
    relative = only(rows(Comparison("loss", less=LESS, relative=True), given)).interval
    assert (relative.estimate, relative.high) == (pytest.approx(40 / 3), pytest.approx(40 / 3 + T_2 * math.sqrt(200 / 3 / 2 / 3)))
    plain = only(rows(Comparison("loss", arms=["gpt_bf16"]), given)).interval
    assert plain.high == pytest.approx(7 / 3 + T_2 * math.sqrt((16 / 9 + 1 / 9 + 25 / 9) / 2 / 3))


def test_a_seed_that_is_missing_is_named_and_left_out_of_both():
    row = only(rows(Comparison("loss", less=LESS), values(gpt_bf16=[1.0, 2.0, None], gpt_x=[1.5, 2.7, 9.0])))
    assert (row.by_seed, row.note) == ({1: 0.5, 2: pytest.approx(0.7)}, "1 of 3 seeds are missing")


def test_a_ratio_of_gaps_holds_what_fieller_says_and_has_no_end_where_the_divisor_may_be_zero():
    table = {"ngpt_*": "gpt_x"}
    comparison = Comparison("loss", kind="ratio", arms=["ngpt_x"], less=LESS, divided_by=table)
    clear = values(gpt_bf16=[1.0, 1.0, 1.0], gpt_x=[1.20, 1.21, 1.19], ngpt_bf16=[2.0, 2.1, 1.9], ngpt_x=[2.10, 2.20, 2.01])
    row = only(rows(comparison, clear))
    gaps, divisors = [0.10, 0.10, 0.11], [0.20, 0.21, 0.19]
    assert row.interval.estimate == pytest.approx(sum(gaps) / sum(divisors)) and row.interval.bounded
    for end in (row.interval.low, row.interval.high):  # there the mean of gap - R divisor is t standard errors from zero
        rest = [gap - end * divisor for gap, divisor in zip(gaps, divisors, strict=True)]
        mean = sum(rest) / 3
        error = math.sqrt(sum((value - mean) ** 2 for value in rest) / 2 / 3)
        assert abs(mean) / error == pytest.approx(T_2, rel=1e-5)
    vague = values(gpt_bf16=[1.0, 1.0, 1.0], gpt_x=[1.2, 0.9, 1.0], ngpt_bf16=[2.0, 2.1, 1.9], ngpt_x=[2.10, 2.20, 2.01])
    assert not only(rows(comparison, vague)).interval.bounded
    # .1, .2, .3 over .2: R = 1, and parts of its error of -.5, 0, .5; t(17) .5 / sqrt(18) = .249, t(16) .5 / sqrt(17) = .257
    even = values(gpt_bf16=[1.0, 1.0, 1.0], gpt_x=[1.2, 1.2, 1.2], ngpt_bf16=[2.0, 2.0, 2.0], ngpt_x=[2.1, 2.2, 2.3])
    assert (pairs := only(rows(comparison, even)).pairs) and pairs.estimate == 18 and row.pairs and row.pairs.estimate == 3


def test_a_slope_is_a_rise_a_doubling_and_an_optimum_a_vertex():
    scan = {rate: [rise * math.log2(rate) + offset for rise, offset in ((0.4, 0.0), (0.5, 1.0), (0.6, 5.0))] for rate in (1.0, 2.0, 8.0)}
    slope = only(rows(Comparison("loss", kind="slope", over="optim.lr"), values(ngpt=scan)))
    assert (slope.interval.estimate, slope.interval.high) == (pytest.approx(0.5), pytest.approx(0.5 + T_2 * 0.1 / math.sqrt(3)))
    assert slope.point == {} and slope.interval.method == "t interval of the mean" and slope.note == ""

    def bowl(*lowest):
        return {2.0**x: [(x - place) ** 2 + place for place in lowest] for x in range(-4, 4)}

    given = values(ngpt_bf16=bowl(-0.3, -0.2, -0.1), ngpt_x=bowl(0.1, 0.3, 0.5))
    optimum = rows(Comparison("loss", kind="optimum", over="optim.lr"), given)
    assert [row.interval.estimate for row in optimum] == [pytest.approx(-0.2), pytest.approx(0.3)]
    shift = only(rows(Comparison("loss", kind="optimum", over="optim.lr", less=LESS), given))
    assert (shift.interval.estimate, shift.interval.high) == (pytest.approx(0.5), pytest.approx(0.5 + T_2 * 0.1 / math.sqrt(3)))
    assert [row.note for row in optimum] == ["", ""]
    edge = values(ngpt={2.0**x: [(x + 4) ** 2 + shift for shift in (0.0, 0.1)] for x in range(-4, 4)})
    assert only(rows(Comparison("loss", kind="optimum", over="optim.lr"), edge)).note == "the lowest value is at the end of the scan"
    hill = values(ngpt={2.0**x: [-(x**2), -(x**2)] for x in range(-1, 2)})
    assert only(rows(Comparison("loss", kind="optimum", over="optim.lr"), hill)).interval.shape == ALL


SLOPE = Comparison("loss", kind="slope", over="optim.lr")


def test_a_slope_is_of_the_seeds_that_have_every_place():
    """Seed 1 has three places, seed 2 all, so its line alone counts; where none has all, those at the places that both have."""
    one = only(rows(SLOPE, values(ngpt={2.0: [1.0, 3.0], 4.0: [9.0, 5.0], 8.0: [9.0, 6.0], 16.0: [None, 9.0]})))
    assert one.by_seed == {2: pytest.approx(1.9)} and one.note == "one seed: the interval is of the scatter about the line"
    assert one.interval.method == "t interval of a least-squares slope" and one.interval.units == 4
    two = only(rows(SLOPE, values(ngpt={2.0: [1.0, 3.0, 0.0], 4.0: [2.0, 5.0, 9.0], 8.0: [3.0, 7.0, None]})))
    assert two.by_seed == {1: pytest.approx(1), 2: pytest.approx(2)} and two.note == "1 of 3 seeds are missing"
    none = only(rows(SLOPE, values(ngpt={2.0: [1.0, 3.0], 4.0: [2.0, 5.0], 8.0: [None, 0.0], 16.0: [9.0, None]})))
    assert none.by_seed == {1: pytest.approx(1), 2: pytest.approx(2)}


def test_a_slope_less_a_reference_is_of_the_seeds_that_both_have():
    given = values(ngpt={2.0: [3.0, 3.5], 4.0: [5.0, 5.4], 8.0: [8.0, 7.0]}, gpt={2.0: [1.0, 1.0], 4.0: [2.0, 2.0], 8.0: [3.0, None]})
    row = only(rows(Comparison("loss", kind="slope", over="optim.lr", arms=["ngpt"], less={"ngpt": "gpt"}), given))
    assert row.by_seed == {1: pytest.approx(1.5)}


def test_reach_is_where_the_curve_comes_down_to_the_references_last_loss():
    reference = {100.0: 3.0, 200.0: 1.75}
    faster = [{50.0: 3.0, 100.0: 2.5, 200.0: 1.5}, {100.0: 1.75, 200.0: 1.0}]
    arms = {"gpt": [reference] * 2, "ngpt": faster, "slow": [{100.0: 4.0, 200.0: 2.1}] * 2}
    found = rows(Comparison("loss", kind="reach", less={"*": "gpt"}), values(**arms))
    assert [row.arm for row in found] == ["ngpt", "slow"]
    assert found[0].by_seed == {1: pytest.approx(175 / 200), 2: pytest.approx(0.5)}
    assert found[0].interval.estimate == pytest.approx(275 / 400)
    assert (found[1].interval.shape, found[1].note) == (ALL, "reached by 0 of 2 seeds")


def test_a_curve_has_the_paired_difference_where_all_have_logged():
    given = values(gpt_bf16=[{1.0: 5.0, 2.0: 4.0}, {1.0: 6.0, 2.0: 5.0}], gpt_x=[{1.0: 5.5, 2.0: 4.2, 3.0: 1.0}, {2.0: 5.4}])
    (found,) = curve(Comparison("loss", less=LESS), given, "val_loss")
    assert [(place["tokens"], place["estimate"]) for place in found["places"]] == [(2.0, pytest.approx(0.3))]


@pytest.mark.parametrize(
    ("low", "high", "must", "value", "result"),
    [
        (0.1, 0.2, "be_above", 0.0, "reproduced"),
        (-0.1, 0.2, "be_above", 0.0, "undecided"),
        (-0.2, -0.1, "be_above", 0.0, "not reproduced"),
        (0.0, 0.0, "be_above", 0.0, "not reproduced"),
        (0.5, 0.9, "be_below", 1.0, "reproduced"),
        (0.5, math.inf, "be_below", 1.0, "undecided"),
        (1.0, math.inf, "be_below", 1.0, "not reproduced"),
        (-0.4, 0.5, "stay_within", 0.5, "reproduced"),
        (-0.4, 0.6, "stay_within", 0.5, "undecided"),
        (0.6, 0.7, "stay_within", 0.5, "not reproduced"),
    ],
)
def test_a_verdict_follows_from_the_whole_interval(low, high, must, value, result):
    def row(arm, interval):
        return {"arm": arm, "label": arm, "point": {}, "interval": interval.to_json()}

    found = [row("a", Interval(0.0, low, high, 3, "")), row("b", Interval(0.0, -9.0, -8.0, 3, ""))]
    assert judged(Rule("x", ["a"], must, value), found)["result"] == result
    everything = Interval(0.0, -math.inf, math.inf, 1, "", ALL)
    assert judged(Rule("x", ["a"], must, value), [row("a", everything)])["result"] == "undecided"


def test_one_contrary_result_refutes_and_all_are_needed():
    assert together(["reproduced", "reproduced"]) == "reproduced"
    assert together(["reproduced", "undecided"]) == "undecided"
    assert together(["reproduced", "undecided", "not reproduced"]) == "not reproduced"
    assert together([]) == "undecided"


def test_a_measure_takes_what_it_says_of_the_keys_that_it_names():
    source = {f"precision/{layer}/fprop/dot_snr_db": values for layer, values in (("a", [1.0, 3.0]), ("b", [5.0, math.nan]))}
    source |= {"precision/a/fprop/dot_snr_db_lower": [0.0]}
    layers = measured(Measure("precision/*/fprop/dot_snr_db", take="first"), source)
    assert layers == {"a": 1.0, "b": 5.0}
    assert math.isnan(measured(Measure("precision/b/*", take="largest"), source)["fprop/dot_snr_db"])
    assert measured(Measure("x", take="count", above=2.0), {"x": [1.0, 2.0, 3.0, math.nan, math.inf]}) == {"x": 3.0}
    assert [measured(Measure("x", take=take), {"x": [4.0, 1.0, 3.0]})["x"] for take in ("last", "mean", "least")] == [3.0, 8 / 3, 1.0]
    assert measured(Measure("x", take="spikes"), {"x": [*[2.0] * 20, 3.0, math.nan, *[2.0] * 5, math.inf]}) == {"x": 2.0}
    assert measured(Measure("val_loss"), {"train_loss": [1.0], "val_loss_x": [1.0]}) == {}


def test_a_phase_change_is_found_where_it_is_and_not_in_a_smooth_fall():
    def loss(tokens, at=None):
        smooth = 4.0 * tokens**-0.1
        return smooth - (0.0 if at is None else 0.5 / (1 + (at / tokens) ** 12))

    places = [1e5 * 1.03**step for step in range(200)]
    for noise in np.random.default_rng(0).normal(0, 0.02, (20, len(places))):
        assert phase_change([(tokens, loss(tokens) + more) for tokens, more in zip(places, noise, strict=True)]) is None
        found = phase_change([(tokens, loss(tokens, 4e6) + more) for tokens, more in zip(places, noise, strict=True)])
        assert found == pytest.approx(4e6, rel=0.15)
    assert phase_change([(tokens, loss(tokens)) for tokens in places]) is None
    # Linear records and a first fall from 5.6, as runs of 1200 steps log it.
    steps = [1, *range(10, 1201, 10)]
    early = [(step * 65536, loss(step * 65536 / 1e5) + 3.0 / (1 + (step / 4) ** 4)) for step in steps]
    assert phase_change(early) is None
