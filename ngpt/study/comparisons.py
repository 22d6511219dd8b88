"""Estimates from the numbers of runs: each comparison of a study as rows, with intervals over seeds."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from ngpt.analysis import statistics
from ngpt.analysis.intervals import Interval, unknown
from ngpt.config.study import SEED, Comparison, Study, partner
from ngpt.study.numbers import Numbers
from ngpt.study.plan import compared, label, reference

RATIO_HALF_WIDTH = 0.25  # a ratio of 0.6 is then told from 1 with some room
AROUND_LOWEST = 5  # a parabola is fitted to this many places around the lowest mean
Point = tuple[tuple[str, Any], ...]
Seeds = dict[int, float]


@dataclass(frozen=True)
class Row:
    """An estimate of one arm at one point of its scan.

    Attributes:
        by_seed: the units behind the interval; for a slope or an optimum, its value for each seed.
        less, divided_by: the arms that this arm is compared with.
        pairs: seeds needed to tell a difference of this size and scatter from zero, or to know a ratio to RATIO_HALF_WIDTH; None of others.
        note: what a reader must know.
    """

    arm: str
    label: str
    point: dict[str, Any]
    interval: Interval
    by_seed: Seeds
    less: str | None = None
    divided_by: str | None = None
    note: str = ""
    pairs: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        by_seed = {str(seed): value if math.isfinite(value) else None for seed, value in self.by_seed.items()}
        pairs = self.pairs.to_json() if self.pairs else None
        return vars(self) | {"interval": self.interval.to_json(), "by_seed": by_seed, "pairs": pairs}


class Values:
    """Numbers by arm, point and seed."""

    def __init__(self, study: Study, numbers: Sequence[Numbers]) -> None:
        self.study, self.numbers = study, numbers

    def points(self, arm: str) -> list[Point]:
        return list(dict.fromkeys(_point(found.run.point) for found in self.numbers if found.run.arm == arm))

    def of(self, measure: str, arm: str, point: Point) -> Seeds:
        """A measure by seed; runs without it are left out."""
        found = ((each.run.seed, each.values.get(measure)) for each in self._runs(arm, point))
        return {seed: value for seed, value in found if value is not None}

    def curve(self, key: str, arm: str, point: Point) -> dict[int, dict[float, float]]:
        """seed -> tokens -> value."""
        return {each.run.seed: dict(each.curves.get(key, [])) for each in self._runs(arm, point)}

    def _runs(self, arm: str, point: Point) -> Iterator[Numbers]:
        # A reference arm that lacks some keys of the scan is the same at all of their values.
        for found in self.numbers:
            if found.run.arm == arm and set(_point(found.run.point)) <= set(point):
                yield found


def rows(comparison: Comparison, values: Values) -> list[Row]:
    """The rows of a comparison: one for every arm at every point of its scan, but none for a reference itself."""
    study = values.study
    found = []
    for arm, less in _with_reference(comparison, study):
        points = values.points(arm)
        if comparison.kind in ("slope", "optimum"):
            points = list(dict.fromkeys(tuple(entry for entry in point if entry[0] != comparison.over) for point in points))
        for point in points:
            interval, by_seed, divisor, note = _KINDS[comparison.kind](comparison, values, arm, point)
            pairs = _ratio_pairs(comparison, values, arm, point) if comparison.kind == "ratio" else None
            if less and comparison.kind in ("mean", "optimum"):
                pairs = _pairs(interval, by_seed)
            found.append(Row(arm, label(study, arm), dict(point), interval, by_seed, less, divisor, note, pairs))
    return found


def _with_reference(comparison: Comparison, study: Study) -> Iterator[tuple[str, str | None]]:
    """The arms that are compared, each with the one it is less. Arms whose references do not belong to the size are left out."""
    for arm in compared(study, comparison.arms):
        less, divisor = reference(comparison.less, arm), partner(arm, comparison.divided_by)
        is_reference = bool(comparison.less) and less is None
        if not is_reference and {less, divisor} <= {None, *study.arms}:
            yield arm, less


def _pairs(interval: Interval, by_seed: Seeds) -> Interval | None:
    """Seeds needed to tell a difference of this size and scatter from zero."""
    size = abs(interval.estimate)
    return statistics.pairs_needed(list(by_seed.values()), size) if interval.bounded and size > 0 else None


def _ratio_pairs(comparison: Comparison, values: Values, arm: str, point: Point) -> Interval | None:
    """Seeds needed to know R, the ratio of the means of x and y, to RATIO_HALF_WIDTH.

    To first order a seed adds (x - R y) / mean y to its error.
    """
    both = _dividends(comparison, values, arm, point).values()
    mean = fmean(below for _, below in both) if both else 0.0
    if len(both) < 2 or mean == 0:
        return None
    ratio = fmean(above for above, _ in both) / mean
    return statistics.pairs_needed([(above - ratio * below) / mean for above, below in both], RATIO_HALF_WIDTH)


def curve(comparison: Comparison, values: Values, key: str) -> list[dict[str, Any]]:
    """A comparison of kind `mean` over training tokens, for each arm and point, where every seed has logged the key."""
    found = []
    for arm, less in _with_reference(comparison, values.study):
        for point in values.points(arm):
            curves = values.curve(key, arm, point)
            others = values.curve(key, less, point) if less else None
            seeds = [seed for seed in curves if others is None or seed in others]
            shared = [
                tokens
                for tokens in (curves[seeds[0]] if seeds else {})
                if all(tokens in curves[seed] and (others is None or tokens in others[seed]) for seed in seeds)
            ]
            places = []
            for tokens in shared:
                units = {seed: curves[seed][tokens] for seed in seeds}
                units = _taken_off(comparison, units, {seed: others[seed][tokens] for seed in seeds} if others else None)
                if all(map(math.isfinite, units.values())):
                    places.append({"tokens": tokens} | statistics.mean_interval(list(units.values())).to_json())
            found.append({"arm": arm, "label": label(values.study, arm), "point": dict(point), "less": less, "places": places})
    return found


def _mean(comparison: Comparison, values: Values, arm: str, point: Point) -> tuple[Interval, Seeds, str | None, str]:
    units = _units(comparison, values, arm, point)
    found = _interval_of(units, statistics.mean_interval)
    if found.bounded and reference(comparison.less, arm):
        found = replace(found, method=f"{found.method} of paired differences")
    return found, units, None, _missing(values, units)


def _ratio(comparison: Comparison, values: Values, arm: str, point: Point) -> tuple[Interval, Seeds, str | None, str]:
    divisor = partner(arm, comparison.divided_by)
    if divisor is None:
        return unknown(math.nan, 0, "no arm to divide by"), {}, None, "no arm to divide by"
    both = _dividends(comparison, values, arm, point)
    units = {seed: above / below if below else math.nan for seed, (above, below) in both.items()}
    if not both:
        return unknown(math.nan, 0, "no seed has both"), {}, divisor, _missing(values, units)
    return statistics.ratio_of_means(*zip(*both.values(), strict=True)), units, divisor, _missing(values, units)


def _dividends(comparison: Comparison, values: Values, arm: str, point: Point) -> dict[int, tuple[float, float]]:
    """What a ratio divides by what, by seed."""
    divisor = partner(arm, comparison.divided_by)
    if divisor is None:
        return {}
    above, below = _units(comparison, values, arm, point), _units(comparison, values, divisor, point)
    return {seed: (above[seed], below[seed]) for seed in above if seed in below}


def _slope(comparison: Comparison, values: Values, arm: str, point: Point) -> tuple[Interval, Seeds, str | None, str]:
    """The rise per doubling: mean and t interval of the slopes of those seeds that have every place. A seed with fewer places may have
    another slope because they are others. If none has every place: of all seeds at the places that they share."""
    places = _places(comparison, values, arm, point)
    seeds = list(dict.fromkeys(seed for _, units in places for seed in units))
    whole = [seed for seed in seeds if all(seed in units for _, units in places)]
    if not whole:
        places, whole = [(x, units) for x, units in places if all(seed in units for seed in seeds)], seeds
    if len(places) < 2:
        return unknown(math.nan, len(whole), "fewer than two places"), {}, None, "fewer than two places"
    x = [place for place, _ in places]
    lines = {seed: statistics.slope(x, [units[seed] for _, units in places]) for seed in whole}
    slopes = {seed: line.estimate for seed, line in lines.items()}
    if len(lines) > 1:
        return statistics.mean_interval(list(slopes.values())), slopes, None, _missing(values, slopes)
    (line,) = lines.values()
    return line, slopes, None, _of_one_seed(len(places), 2, "line")


def _optimum(comparison: Comparison, values: Values, arm: str, point: Point) -> tuple[Interval, Seeds, str | None, str]:
    less = reference(comparison.less, arm)
    scan = _scan(comparison, values, arm, point)
    x, curves = _around_lowest(*scan)
    if len(x) < 3:
        return unknown(math.nan, len(curves), "fewer than three places"), {}, None, "fewer than three places"
    lowest = {seed: statistics.vertex(x, line).estimate for seed, line in curves.items()}
    note = "the lowest value is at the end of the scan" if _lowest(*scan) in (0, len(scan[0]) - 1) else ""
    if less is not None:
        other_x, others = _around_lowest(*_scan(comparison, values, less, point))
        shared = [seed for seed in curves if seed in others]
        if len(other_x) < 3 or not shared:
            return unknown(math.nan, 0, "no optimum of the reference"), {}, None, "no optimum of the reference"
        lowest = {seed: lowest[seed] - statistics.vertex(other_x, others[seed]).estimate for seed in shared}
    finite = {seed: place for seed, place in lowest.items() if math.isfinite(place)}
    if len(finite) < len(lowest):
        return unknown(math.nan, len(lowest), "a parabola has no lowest point"), finite, None, "a parabola has no lowest point"
    if len(lowest) > 1 or less is not None:
        return statistics.mean_interval(list(lowest.values())), lowest, None, note
    (line,) = curves.values()
    return statistics.vertex(x, line), lowest, None, note or _of_one_seed(len(x), 3, "parabola")


def _of_one_seed(places: int, fewest: int, shape: str) -> str:
    if places == fewest:
        return f"one seed at {places} places: no scatter about the {shape}"
    return f"one seed: the interval is of the scatter about the {shape}"


def _reach(comparison: Comparison, values: Values, arm: str, point: Point) -> tuple[Interval, Seeds, str | None, str]:
    less = reference(comparison.less, arm)
    if less is None:
        return unknown(math.nan, 0, "nothing to reach"), {}, None, "nothing to reach"
    curves, others = values.curve("val_loss", arm, point), values.curve("val_loss", less, point)
    shared = [seed for seed in curves if curves[seed] and others.get(seed)]
    places = {seed: _first_below(curves[seed], list(others[seed].values())[-1]) for seed in shared}
    units = {seed: place / max(others[seed]) for seed, place in places.items() if place is not None}
    if len(units) < len(shared):
        return unknown(math.nan, len(units), "not reached by every seed"), units, None, f"reached by {len(units)} of {len(shared)} seeds"
    return _interval_of(units, statistics.mean_interval), units, None, _missing(values, units)


_KINDS: Mapping[str, Callable[[Comparison, Values, str, Point], tuple[Interval, Seeds, str | None, str]]] = {
    "mean": _mean,
    "ratio": _ratio,
    "slope": _slope,
    "optimum": _optimum,
    "reach": _reach,
}


def _units(comparison: Comparison, values: Values, arm: str, point: Point) -> Seeds:
    """The measure of an arm by seed, minus that of its reference."""
    less = reference(comparison.less, arm)
    own = values.of(comparison.measure, arm, point)
    return _taken_off(comparison, own, values.of(comparison.measure, less, point) if less else None)


def _taken_off(comparison: Comparison, own: Seeds, others: Seeds | None) -> Seeds:
    if others is None:
        return own
    unit = {seed: abs(value) / 100 if comparison.relative else 1.0 for seed, value in others.items()}
    return {seed: (value - others[seed]) / unit[seed] for seed, value in own.items() if seed in others and unit[seed]}


def _places(comparison: Comparison, values: Values, arm: str, rest: Point, paired: bool = True) -> list[tuple[float, Seeds]]:
    """log2 of the scanned values, in their order, with the numbers of each seed there."""
    found = []
    for point in values.points(arm):
        place = dict(point).get(comparison.over)
        if place is not None and set(rest) <= set(point):
            units = _units(comparison, values, arm, point) if paired else values.of(comparison.measure, arm, point)
            found.append((math.log2(float(place)), units))
    return sorted(((x, units) for x, units in found if units), key=lambda pair: pair[0])


def _scan(comparison: Comparison, values: Values, arm: str, rest: Point) -> tuple[list[float], dict[int, list[float]]]:
    """log2 of the scanned values at which every seed has a number, and each seed's numbers there."""
    found = _places(comparison, values, arm, rest, paired=False)
    seeds = list(dict.fromkeys(seed for _, units in found for seed in units))
    whole = [(x, units) for x, units in found if all(seed in units for seed in seeds)]
    return [x for x, _ in whole], {seed: [units[seed] for _, units in whole] for seed in seeds}


def _around_lowest(x: list[float], lines: dict[int, list[float]]) -> tuple[list[float], dict[int, list[float]]]:
    """The places around the lowest mean. Far from it, a loss is not a parabola."""
    if not x:
        return x, lines
    start = min(max(_lowest(x, lines) - AROUND_LOWEST // 2, 0), max(len(x) - AROUND_LOWEST, 0))
    part = slice(start, start + AROUND_LOWEST)
    return x[part], {seed: line[part] for seed, line in lines.items()}


def _lowest(x: list[float], lines: dict[int, list[float]]) -> int:
    """The index of the lowest mean over seeds."""
    means = [fmean(line[index] for line in lines.values()) for index in range(len(x))]
    return means.index(min(means))


def _first_below(curve: Mapping[float, float], bound: float) -> float | None:
    """Tokens at which a curve first falls to a bound, interpolated linearly between two records."""
    before: tuple[float, float] | None = None
    for tokens, loss in curve.items():
        if loss <= bound:
            if before is None or not math.isfinite(before[1]) or before[1] == loss:
                return tokens
            return before[0] + (tokens - before[0]) * (before[1] - bound) / (before[1] - loss)
        before = tokens, loss
    return None


def _interval_of(units: Seeds, estimate: Callable[[list[float]], Interval]) -> Interval:
    return estimate(list(units.values())) if units else unknown(math.nan, 0, "no run has it")


def _missing(values: Values, units: Seeds) -> str:
    lacking = len(values.study.lists[SEED]) - len(units)
    if lacking:
        return f"{lacking} of {len(units) + lacking} seeds are missing"
    return "all seeds agree exactly" if len(units) > 1 and len(set(units.values())) == 1 else ""


def _point(point: Mapping[str, Any]) -> Point:
    return tuple(point.items())
