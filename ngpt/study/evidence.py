"""Runs of a study whose numbers come from results of the same study that were made elsewhere."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.config.study import METRICS, as_plain
from ngpt.study.numbers import Numbers
from ngpt.study.plan import Plan, PlannedRun, differing, filled_options, is_ended
from ngpt.study.results import MALFORMED, damaged, numbers_of, read

_OF_MEASURE, _OF_ANALYSIS = ("source", "key", "take", "above"), ("what", "step")


def taken_from(
    files: Sequence[Path], plan: Plan, here: Collection[str], trains: bool, has_config: Callable[[PlannedRun, str], bool]
) -> tuple[dict[str, Numbers], list[str]]:
    """Takes the runs of a plan that files hold finished, with the same words, and with the same config where a file tells its digest.

    A trunk and its branches, of one seed and point, are a family. It comes from the first file that has all of it, or is made here: a file
    has no checkpoint to continue, and branches of two trunks are no pair. A family of which a run is finished here is not taken.

    Args:
        here: names of the runs that are finished here.
        trains: whether the other runs will be trained. If not, a family that no file has whole comes from the file with most of it.
        has_config: whether the config of a run, as it is composed now, has this digest.

    Returns:
        The numbers of the runs that are taken, by name; and what a user must know, a line each.

    Raises:
        ConfigError: a file is damaged, of another study, or defines a measure in another way.
    """
    held, notes = {}, list[str]()
    unique: dict[Path, Path] = {}
    for path in files:
        unique.setdefault(path.resolve(), path)
    for path in unique.values():
        held[path], others, beyond = _held(path, plan)
        notes += [f"{len(others)} runs in {path} have other words, the first is {name}: {' '.join(others[name])}" for name in [*others][:1]]
        notes += [f"{len(beyond)} runs in {path} are not planned, the first is {name}: give the lists that it needs" for name in beyond[:1]]
        candidates = [one for name, one in held[path].items() if name not in here]
        for name in (changed := _changed(candidates, has_config)):
            del held[path][name]
        notes += [f"{len(changed)} runs in {path} are not taken, the first is {name}: its config is another now" for name in changed[:1]]
        if any(one.config_sha256 is None for one in candidates):
            notes.append(f"{path} does not say what its configs were: words alone are compared")
    families: dict[str, list[PlannedRun]] = {}
    for run in plan.runs:
        families.setdefault(run.after or run.name, []).append(run)
    places = {}
    for family in families.values():
        sizes = {path: sum(run.name in runs for run in family) for path, runs in held.items()}
        best = max(sizes, key=sizes.__getitem__)  # of equals the first
        if sizes[best] >= (len(family) if trains else 1) and not any(run.name in here for run in family):
            places |= {run.name: best for run in family if run.name in held[best]}
    for path, runs in held.items():
        notes.append(f"{sum(place == path for place in places.values())} runs are in {path}")
        if alone := [name for name in runs if name not in places and name not in here]:
            (family,) = [family for family in families.values() if any(run.name == alone[0] for run in family)]
            lacking = [f", and it lacks {run.name}" for run in family if run.name not in runs]
            rule = f"a trunk and all its branches come from one place{''.join(lacking[:1])}"
            notes.append(f"{len(alone)} more runs in {path} are not taken, the first is {alone[0]}: {rule}")
    differ = Counter((path, place) for name, place in places.items() for path in held if _differ(held[path].get(name), held[place][name]))
    notes += [f"{count} runs have other numbers in {path}: those of {place} are taken" for (path, place), count in differ.items()]
    return {name: held[place][name] for name, place in places.items()}, notes


def _held(path: Path, plan: Plan) -> tuple[dict[str, Numbers], dict[str, list[str]], list[str]]:
    """The planned runs that a file holds finished, those with other words, with these words, and the names of those not planned."""
    results = read(path)
    if results["name"] != plan.name:
        raise ConfigError("--from", path, f"It is of the study {results['name']}, and {plan.name} was asked for", "Leave it out")
    planned, held, others, beyond = {run.name: run for run in plan.runs}, {}, {}, list[str]()
    try:
        for name, definition, now in _redefined(results["study"], as_plain(plan.study)):
            way_out = "Leave the file out, or use the study and lists that it was made with"
            raise ConfigError(str(path), f"{name} is {definition}", f"Here it is {now}, which is another measure", way_out)
        _check(results["runs"])
        for found in results["runs"]:
            run = planned.get(found["name"])
            if run is None:
                beyond.append(found["name"])
            if run is None or not is_ended(found["status"], plan.is_trunk(run)):
                continue
            if (changed := differing(found["words"], run.words)) or found["after"] != run.after:
                others[run.name] = changed or [f"after {found['after']}"]
            else:
                held[run.name] = numbers_of(run, found, plan.study, results["study"]["measures"], path)
    except ConfigError:
        raise
    except MALFORMED as error:
        raise damaged(path, error) from error
    return held, others, beyond


def _changed(candidates: Sequence[Numbers], has_config: Callable[[PlannedRun, str], bool]) -> list[str]:
    """The runs that would have another config if they were trained now. One whose digest is unknown is none of them."""
    return [one.run.name for one in candidates if one.config_sha256 is not None and not has_config(one.run, one.config_sha256)]


def _check(runs: Sequence[Mapping[str, Any]]) -> None:
    """Refuses runs that would be taken for something else. What is missing or no number is found where it is read.

    Raises:
        TypeError, ValueError: says what is wrong.
    """
    names = [run["name"] for run in runs]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{twice[0]} is there twice")
    for run in runs:
        if not isinstance(run["words"], list) or not all(isinstance(word, str) for word in run["words"]):
            raise TypeError(f"words of {run['name']} are no list of words")


def _redefined(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Measures of both studies that are not taken in the same way: name, old and new definition."""
    for name in new["measures"]:
        if name in old["measures"]:
            first, second = _definition(old, name), _definition(new, name)
            if first != second:
                yield name, first, second


def _definition(study: Mapping[str, Any], name: str) -> str:
    """All that makes the number, but for the texts around it."""
    measure = study["measures"][name]
    parts = [f"{key}={measure[key]}" for key in _OF_MEASURE]
    if measure["source"] != METRICS:
        analysis = study["analyses"][measure["source"]]
        options = " ".join(filled_options(analysis["options"], study["lists"]))
        parts += [*(f"{key}={analysis[key]}" for key in _OF_ANALYSIS), f"options={options}"]
    return " ".join(parts)


def _differ(first: Numbers | None, second: Numbers) -> bool:
    """Whether both have a number that is not the same."""
    if first is None:
        return False
    values = ((value, second.values[name]) for name, value in first.values.items())
    curves = ((curve, second.curves.get(key)) for key, curve in first.curves.items())
    return any(one != other for one, other in [*values, *curves] if one is not None and other is not None)
