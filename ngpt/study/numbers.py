"""Numbers of finished runs: each run's values of the study's measures, and its curves."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ngpt.analysis import compare
from ngpt.analysis.drawing import thinned
from ngpt.analysis.groups import Series
from ngpt.config.errors import ConfigError
from ngpt.config.study import METRICS, Measure, Study
from ngpt.spikes import loss_spikes
from ngpt.study.analyses import result_of
from ngpt.study.plan import Plan, PlannedRun

LOSSES = ("val_loss", "train_loss")
FEWEST_RECORDS = 100  # fewest records of a loss in which to look for a phase change
_SIDE, _NEIGHBOUR, _FASTER, _NOISES = 1.15, 1.5, 1.5, 4  # of `phase_change`
_EARLY = 0.05  # part of the tokens that `phase_change` does not look at


@dataclass(frozen=True)
class Numbers:
    """The numbers of one run.

    Attributes:
        status: as of `ngpt.analysis.compare.Status`; or why there are no numbers.
        values: measure -> its number; None if the run has none, or it is not finite.
        layers: measure with a glob -> what the glob matched -> number.
        curves: key of metrics.jsonl -> (tokens, value) of each record.
        origin: the file of results that they were taken from; None: read from the run's folder.
        config_sha256: that of the run's config, if the file says it.
        tokenizer: `tokenizer.kind` of the run, if it is known.
        damaged: analysis -> why its result cannot be read.
    """

    run: PlannedRun
    status: str
    command: str
    provenance: Mapping[str, Any]
    tokens: float = math.nan
    values: dict[str, float | None] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    origin: str | None = None
    config_sha256: str | None = None
    tokenizer: str | None = None
    damaged: dict[str, str] = field(default_factory=dict)


def read_numbers(plan: Plan, folder: Path, taken: Mapping[str, Numbers]) -> list[Numbers]:
    """The numbers of every run of a plan. A run that has logged nothing has the status `missing`, one with a damaged file says so there.
    An analysis whose result is damaged gives no number.

    Args:
        taken: those that are not read from the folder, by the name of their run.
    """
    files = {(analysis.run, analysis.analysis): folder / analysis.file for analysis in plan.analyses}
    return [taken.get(run.name) or _of_run(plan.study, run, folder / run.name, files) for run in plan.runs]


def _of_run(study: Study, planned: PlannedRun, folder: Path, files: Mapping[tuple[str, str], Path]) -> Numbers:
    if not (folder / "metrics.jsonl").exists():
        return Numbers(planned, "missing", "", {})
    try:
        run = compare.load_run(folder)
    except ConfigError as error:
        return Numbers(planned, f"unreadable: {str(error).removeprefix(f'{folder}/')}", "", {})
    environment = run.environment or {}
    keys = dict.fromkeys(key for record in run.metrics for key in record)
    series = {key: run.series(key, run.tokens) for key in keys}
    sources: dict[str, dict[str, Sequence[float]]] = {METRICS: {key: values for key, (_, values) in series.items()}}
    damaged = {}
    for name in study.analyses:
        path, found = files.get((planned.name, name)), None
        try:
            found = None if path is None else result_of(path)
        except ConfigError as error:
            damaged[name] = str(error).removeprefix(f"{path}: ")
        sources[name] = _leaves(found and found["results"])
    wanted = [*LOSSES, *(measure.key for measure in study.measures.values() if measure.source == METRICS)]
    curves = {key: _mean_curve(series, key) for key in dict.fromkeys(wanted)}
    numbers = Numbers(
        planned,
        run.status.kind,
        str(environment.get("command", "")),
        {key: environment.get(key) for key in ("git", "versions", "gpus", "python", "platform")},
        tokens=run.tokens[-1],
        curves={key: _thinned(list(curve), list(curve.values())) for key, curve in curves.items() if curve},
        tokenizer=run.flat_config.get("tokenizer.kind"),
        damaged=damaged,
    )
    for name, measure in study.measures.items():
        taken = measured(measure, sources[measure.source])
        numbers.values[name] = finite(fmean(taken.values())) if taken else None
        if "*" in measure.key:
            numbers.layers[name] = {key: value for key, value in taken.items() if math.isfinite(value)}
    return numbers


def measured(measure: Measure, source: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The value that a measure takes from each key it names, by the part of the key that the first * matches."""
    pattern, found = _pattern(measure.key), {}
    for key, values in source.items():
        if (match := pattern.match(key)) and values:
            found[match[1] if match.groups() else key] = _taken(measure, values)
    return found


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(translate(key).replace(".*", "(.*)", 1) if "*" in key else re.escape(key) + r"\Z")


def _mean_curve(series: Mapping[str, tuple[list[float], list[float]]], key: str) -> dict[float, float]:
    """tokens -> the mean over all series that a key matches there."""
    pattern = _pattern(key)
    found: dict[float, list[float]] = {}
    for name, (tokens, values) in series.items():
        if pattern.match(name):
            for place, value in zip(tokens, values, strict=True):
                found.setdefault(place, []).append(value)
    return {place: fmean(values) for place, values in sorted(found.items())}


def _taken(measure: Measure, values: Sequence[float]) -> float:
    if measure.take == "count":  # a non-finite value is above any bound
        return float(sum(not value <= measure.above for value in values))
    if measure.take == "spikes":
        return float(len(loss_spikes(values)))
    take = {"last": lambda: values[-1], "first": lambda: values[0], "mean": lambda: fmean(values)}
    take |= {"least": lambda: min(values), "largest": lambda: max(values)}
    # A minimum or maximum of numbers with a NaN among them depends on their order.
    return math.nan if measure.take in ("least", "largest") and any(map(math.isnan, values)) else take[measure.take]()


def _leaves(tree: Any, prefix: str = "") -> dict[str, Sequence[float]]:
    """The numbers in nested mappings, by path with / between the keys. A mapping with `value` counts as that number; so do its bounds."""
    if isinstance(tree, bool):
        return {}
    if isinstance(tree, int | float):
        return {prefix: [float(tree)]}
    if not isinstance(tree, dict):
        return {}
    of_value = {prefix: [float(tree["value"])]} if prefix and isinstance(tree.get("value"), int | float) else {}
    parts = (_leaves(value, f"{prefix}/{key}" if prefix else str(key)) for key, value in tree.items())
    return of_value | {key: value for part in parts for key, value in part.items()}


def _thinned(tokens: list[float], values: list[float]) -> list[tuple[float, float]]:
    kept = thinned(Series(tokens, values, values, values))
    return list(zip(kept.x, kept.mean, strict=True))


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def phase_change(curve: Sequence[tuple[float, float]]) -> float | None:
    """Tokens at which a loss falls in a distinct step, such as that of in-context copying; None if there is no such step.

    The fall of the loss between tokens / 1.15 and tokens * 1.15 is compared with the falls around tokens / 1.5 and tokens * 1.5. It is a
    step if it is at least 1.5 times the larger of them, plus four times the noise: the median change between neighbouring records. The
    place of the largest such fall is returned. Not looked at are the first 5 % of the tokens, in which every loss falls from that of
    guessing, and the last two fifths, which have no falls behind them to compare with. With fewer than 100 records the result is None.
    """
    points = [(math.log(tokens), loss) for tokens, loss in curve if tokens > 0 and math.isfinite(loss)]
    if len(points) < FEWEST_RECORDS:
        return None
    noise = median(abs(after - before) for (_, before), (_, after) in pairwise(points))
    start, end, side, apart = points[0][0], points[-1][0], math.log(_SIDE), math.log(_NEIGHBOUR)
    best, found, place = 0.0, None, max(start + apart + side, end + math.log(_EARLY))
    while place <= end - apart - side:
        fall, before, behind = (_fall(points, at, side) for at in (place, place - apart, place + apart))
        if fall > best and fall >= _FASTER * max(before, behind, 0.0) + _NOISES * noise:
            best, found = fall, math.exp(place)
        place += side / 4
    return found


def _fall(points: Sequence[tuple[float, float]], place: float, side: float) -> float:
    return _mean_near(points, place - side, side / 2) - _mean_near(points, place + side, side / 2)


def _mean_near(points: Sequence[tuple[float, float]], place: float, width: float) -> float:
    """The mean loss around a place; if no point is near enough, the loss of the nearest point."""
    near = [loss for at, loss in points if abs(at - place) <= width]
    return fmean(near) if near else min(points, key=lambda point: abs(point[0] - place))[1]
