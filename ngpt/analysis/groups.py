"""Runs that differ only in their seed, as one group: the mean of what they logged, and its extremes."""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from ngpt.analysis.compare import Run, choices

_SEED = "train.seed"
# what remains of names that end in a seed: "base_seed", "base-s", "base."
_SEED_WORD = re.compile(r"([-_. ](seed|s))?[-_. =]*$", re.IGNORECASE)


@dataclass(frozen=True)
class Series:
    """Points of a curve: increasing x, and at each the mean and the extremes over the runs of a group. All lists have the same length."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]

    def __len__(self) -> int:
        return len(self.x)

    def only(self, indices: Iterable[int]) -> "Series":
        indices = list(indices)
        return Series(*([values[index] for index in indices] for values in (self.x, self.mean, self.low, self.high)))


@dataclass(frozen=True)
class Group:
    """One run, or several whose configs differ only in `train.seed`. The groups of a report have different names."""

    name: str
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} seeds)"

    def series(self, key: str, axis: str = "tokens") -> Series:
        """`key` of metrics.jsonl over tokens trained on, or over training time.

        For several runs, only token counts at which all of them logged the key are kept. Nothing is interpolated.

        Args:
            key: a key of metrics.jsonl.
            axis: tokens | training_seconds; for several runs the seconds are the mean at those tokens.

        Returns:
            The series, with NaN in mean, low and high where a run logged a non-finite value.
        """
        if len(self.runs) == 1:
            x, y = self.runs[0].series(key, getattr(self.runs[0], axis))
            return Series(x, y, y, y)
        found = [points(run, key) for run in self.runs]
        shared = [tokens for tokens in found[0] if all(tokens in other for other in found[1:])]
        values = [[points_of_run[tokens] for points_of_run in found] for tokens in shared]
        x = shared
        if axis != "tokens":
            times = [dict(zip(run.tokens, getattr(run, axis), strict=True)) for run in self.runs]
            x = [fmean(at[tokens] for at in times) for tokens in shared]
        return spread(x, values)

    def agreed(self, key: str) -> object:
        """The value of a config key if all runs agree on it; None if they do not, or lack it."""
        values = [run.flat_config.get(key) for run in self.runs]
        return values[0] if all(value == values[0] for value in values) else None


def points(run: Run, key: str) -> dict[float, float]:
    """The values of `key` that a run logged, by tokens."""
    return dict(zip(*run.series(key, run.tokens), strict=True))


def spread(x: list[float], values: Sequence[Sequence[float]]) -> Series:
    """Mean and extremes of the values at each x; NaN where one of them is not finite."""
    rows = [at if all(map(math.isfinite, at)) else [math.nan] for at in values]
    return Series(x, *([reduce(row) for row in rows] for reduce in (fmean, min, max)))


def differ_in_text(runs: Iterable[Run], split: str) -> bool:
    """Whether runs read different texts of a split: losses on them cannot be compared. Of `valid`, runs that did not validate are left out.

    Args:
        split: train | valid.
    """
    read = (run for run in runs if split == "train" or run.total("val_loss") is not None)
    return len({json.dumps(run.flat_config.get(f"data.{split}"), sort_keys=True, default=str) for run in read}) > 1


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """The runs as groups, in the order in which their first runs are given.

    Runs belong to one group if their configs differ only in the seed, their names, and paths inside their own folders.
    """
    found: list[tuple[dict[str, object], list[Run]]] = []
    for run in runs:
        config = {key: value for key, value in choices(run).items() if key != _SEED}
        seed = run.flat_config.get(_SEED)
        for other, members in found:
            # two runs with the same seed are no sample of seeds: a reader wants to see them apart
            seeds = [member.flat_config.get(_SEED) for member in members]
            if other == config and None not in (seed, *seeds) and seed not in seeds:
                members.append(run)
                break
        else:
            found.append((config, [run]))
    names = [_common_name([run.name for run in members]) for _, members in found]
    return [
        Group(name if names.count(name) == 1 else members[0].name, tuple(members)) for name, (_, members) in zip(names, found, strict=True)
    ]


def _common_name(names: Sequence[str]) -> str:
    """The common prefix of the names of a group's runs, without the word before the seed; the first name if nothing is left."""
    if len(names) == 1:
        return names[0]
    common = os.path.commonprefix(list(names)).rstrip("0123456789") if len(set(names)) > 1 else names[0]
    return _SEED_WORD.sub("", common) or names[0]


def difference(group: Group, base: Group, key: str, relative: bool = False) -> Series:
    """`key` of each run of a group minus the mean of `base`, at the token counts where every run of both logged it.

    Args:
        relative: divide by the mean of `base`, in percent.

    Returns:
        The difference over tokens. Nothing is interpolated: groups that share no token count have no difference.
    """
    of_base, found = base.series(key), [points(run, key) for run in group.runs]
    at_base = dict(zip(of_base.x, of_base.mean, strict=True))
    shared = [tokens for tokens in at_base if all(tokens in run for run in found)]
    units = [at_base[tokens] / 100 if relative else 1.0 for tokens in shared]
    values = [
        [(run[tokens] - at_base[tokens]) / unit if unit else math.nan for run in found] for tokens, unit in zip(shared, units, strict=True)
    ]
    return spread(shared, values)
