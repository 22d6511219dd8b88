"""The results of a study as one JSON: every number behind its page, with definitions, commands, commit and versions."""

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.config.study import METRICS, Study, as_plain
from ngpt.files import keep_aside, replacing
from ngpt.study import comparisons
from ngpt.study.comparisons import Values
from ngpt.study.numbers import LOSSES, Numbers, finite, phase_change, read_numbers
from ngpt.study.plan import Plan, PlannedAnalysis, PlannedRun, is_ended
from ngpt.study.verdict import NOT_JUDGED, judged, together

FORMAT = 1
# What shows that results are damaged, wherever something within their parts is missing, of another type or too large.
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, OverflowError)
# The parts of results and the type of each, as `gather` makes them.
_PARTS: dict[str, type] = {
    "name": str,
    "size": str,
    "description": str,
    "command": str,
    "provenance": dict,
    "study": dict,
    "runs": list,
    "comparisons": dict,
    "verdict": dict,
    "missing": list,
}
_RULE, _WAY_OUT = "The results of a study, as `ngpt study` writes them", "Give the results.json of a study"


def gather(
    plan: Plan,
    folder: Path,
    description: str,
    command: str,
    provenance: Mapping[str, Any],
    taken: Mapping[str, Numbers] | None = None,
    configs: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """Computes the results from the runs on disk and those taken from other results, however many there are.

    Args:
        folder: the study's folder.
        description: the first comment of its file.
        command: the command that makes it again.
        provenance: commit and versions of the code that computes the results.
        taken: the numbers of runs that other results hold, by name.
        configs: the digest of the config of each run on disk, by name.
    """
    numbers = read_numbers(plan, folder, taken or {})
    of_runs = {each.run.name: each for each in numbers}
    lacking = {one.file: _lacking(one, of_runs[one.run], plan.study, folder) for one in plan.analyses}
    values = Values(plan.study, numbers)
    of_comparisons = {name: _comparison(plan.study, name, values) for name in plan.study.comparisons}
    rules = [judged(rule, of_comparisons[rule.comparison]["rows"]) for rule in plan.study.verdict]
    judges = plan.study.sizes[plan.size].judges
    return {
        "format": FORMAT,
        "name": plan.name,
        "size": plan.size,
        "description": description,
        "command": command,
        "provenance": dict(provenance),
        "study": as_plain(plan.study),
        "runs": [_run(each) | _source(each, folder, configs or {}) for each in numbers],
        "comparisons": of_comparisons,
        "verdict": {"result": together([rule["result"] for rule in rules]) if judges else NOT_JUDGED, "rules": rules},
        "missing": [f"{each.run.name}: {each.status}" for each in numbers if not is_ended(each.status, plan.is_trunk(each.run))]
        + [f"{file}: {why}" for file, why in lacking.items() if why],
    }


def _lacking(analysis: PlannedAnalysis, numbers: Numbers, study: Study, folder: Path) -> str:
    """Why an analysis has no result; empty if it has one. Of a run taken from other results, the measures tell."""
    if analysis.analysis in numbers.damaged:
        return f"unreadable: {numbers.damaged[analysis.analysis]}"
    measures = (name for name, measure in study.measures.items() if measure.source == analysis.analysis)
    there = (folder / analysis.file).exists() if numbers.origin is None else any(numbers.values[name] is not None for name in measures)
    return "" if there else "not there"


def _source(numbers: Numbers, folder: Path, configs: Mapping[str, str | None]) -> dict[str, Any]:
    """Where a run comes from: a file or a run of another study, `STUDY_SIZE/RUN`; None if the study's own. And its config's digest."""
    if numbers.origin is not None:
        return {"origin": numbers.origin, "config_sha256": numbers.config_sha256}
    place = folder / numbers.run.name
    linked = os.path.relpath(place.resolve(), folder.parent.resolve()) if place.is_symlink() else None
    return {"origin": linked, "config_sha256": configs.get(numbers.run.name)}


def _comparison(study: Study, name: str, values: Values) -> dict[str, Any]:
    comparison = study.comparisons[name]
    found: dict[str, Any] = {"rows": [row.to_json() for row in comparisons.rows(comparison, values)]}
    measure = study.measures[comparison.measure]
    if any(figure.kind == "tokens" and name in figure.of for figure in study.figures) and measure.source == METRICS:
        found["curves"] = comparisons.curve(comparison, values, measure.key)
    return found


def _run(numbers: Numbers) -> dict[str, Any]:
    run = numbers.run
    losses = next((numbers.curves[key] for key in reversed(LOSSES) if key in numbers.curves), [])
    return {
        "name": run.name,
        "arm": run.arm,
        "point": dict(run.point),
        "seed": run.seed,
        "after": run.after,
        "words": list(run.words),
        "status": numbers.status,
        "tokens": finite(numbers.tokens),
        "tokenizer": numbers.tokenizer,
        "phase_change": phase_change(losses),
        "measures": numbers.values,
        "layers": numbers.layers,
        "curves": {key: [[tokens, finite(value)] for tokens, value in points] for key, points in numbers.curves.items()},
        "command": numbers.command,
        "provenance": dict(numbers.provenance),
    }


def numbers_of(run: PlannedRun, found: Mapping[str, Any], study: Study, defined: Collection[str], path: Path) -> Numbers:
    """The numbers of a run in the results of a file, as `_run` made them. A measure that they lack or do not define is missing.

    Args:
        defined: the measures that the results define.
    """
    measures = {name: measure for name, measure in study.measures.items() if name in defined}
    origin = found.get("origin")
    if not str(origin).endswith(".json"):  # of the files that it has come through the first, many of which are called results.json
        origin = "/".join(path.resolve().parts[-2:])
    if not isinstance(tokenizer := found.get("tokenizer"), str | None):
        raise TypeError(f"tokenizer of {run.name} is no name")
    return Numbers(
        run,
        found["status"],
        found["command"],
        dict(found["provenance"]),
        tokens=_or_nan(found["tokens"]),
        values=dict.fromkeys(study.measures) | {name: finite(_or_nan(found["measures"].get(name))) for name in measures},
        layers={
            name: {key: _number(value) for key, value in found["layers"].get(name, {}).items()}
            for name, measure in measures.items()
            if "*" in measure.key
        },
        curves={key: [(_number(tokens), _or_nan(value)) for tokens, value in points] for key, points in found["curves"].items()},
        origin=origin,
        config_sha256=found.get("config_sha256"),
        tokenizer=tokenizer,
    )


def _or_nan(value: Any) -> float:
    return math.nan if value is None else _number(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r:.40} is not a number")
    return float(value)


def write(results: Mapping[str, Any], path: Path) -> None:
    """Writes results atomically."""
    with replacing(path) as stream:
        stream.write((json.dumps(results, indent=1, allow_nan=False) + "\n").encode())


def keep_lost(path: Path, results: Mapping[str, Any], is_done: Callable[[Path, bool], bool]) -> str | None:
    """Moves a results file aside that `write` is about to replace, if it alone has the numbers of a run.

    Args:
        is_done: whether a folder has the finished run, which is a trunk or not. Its numbers can be read again.

    Returns:
        What a user must know; None if nothing is lost.
    """
    if not path.exists():
        return None
    try:
        known = _ended(read(path))
    except MALFORMED:
        return None
    now = _ended(results)
    lost = [name for name, trunk in known.items() if name not in now and not is_done(path.parent / name, trunk)]
    if not lost:
        return None
    kept = keep_aside(path)
    shown = f"ngpt study --report {kept} --out DIR shows them"
    return f"{len(lost)} runs of {path} are not there any more, the first is {lost[0]}. {kept} has their numbers, and {shown}"


def _ended(results: Mapping[str, Any]) -> dict[str, bool]:
    """The runs that have ended, by name; and whether each is a trunk."""
    trunks = {name for name, arm in results["study"]["arms"].items() if arm["until"] is not None}
    return {run["name"]: run["arm"] in trunks for run in results["runs"] if is_ended(run["status"], run["arm"] in trunks)}


def read(path: Path) -> dict[str, Any]:
    """Reads results back.

    Raises:
        ConfigError: the file does not hold results, has another format, or lacks a part of them.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(str(path), error.strerror, _RULE, _WAY_OUT) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), error, _RULE, "Restore it") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        got = found.get("format") if isinstance(found, dict) else type(found).__name__
        way_out = "Use the version that wrote it" if isinstance(got, int) else _WAY_OUT
        raise ConfigError(str(path), f"format {got}", f"{_RULE}, have format {FORMAT}", way_out)
    for part, kind in _PARTS.items():
        if not isinstance(found.get(part), kind):
            got = f"{part} is {type(found[part]).__name__}" if part in found else f"No {part}"
            raise ConfigError(str(path), got, f"{_RULE}, have {part} of type {kind.__name__}", "Restore it")
    return found


def damaged(path: Path, error: Exception) -> ConfigError:
    """The error for results whose page cannot be made, since something within their parts is missing or of another type."""
    return ConfigError(str(path), f"{type(error).__name__}: {error}", f"{_RULE}, hold all that the page shows", "Restore it")
