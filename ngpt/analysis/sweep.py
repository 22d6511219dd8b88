"""The report of a sweep: members that differ only in their seed are one group, and a table shows the final loss of each setting."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from ngpt.analysis.compare import Run, load_run
from ngpt.analysis.formats import MISSING
from ngpt.analysis.groups import Group, differ_in_text
from ngpt.analysis.statistics import within_noise
from ngpt.config.errors import ConfigError
from ngpt.shell import in_shell
from ngpt.sweeps import SWEEP_FILE, Sweep, SweptRun, by_seed, read_sweep, without_seed


@dataclass(frozen=True)
class Setting:
    """A row of the table: values of the swept keys without the seed, and the result of its runs.

    Attributes:
        loss: mean, with ± standard error of the mean if there are several seeds.
        runs: how many runs count, of how many.
        best: no other row has a lower mean, nor one within the noise of seeds or of another validation text.
    """

    values: list[str]
    loss: str
    runs: str
    best: bool = False


@dataclass(frozen=True)
class SettingTable:
    """Final losses by swept values.

    Attributes:
        keys: headings of the value columns.
        loss: which loss is shown.
        failed: members that failed, each with the reason.
    """

    keys: list[str]
    loss: str
    rows: list[Setting]
    failed: list[tuple[str, str]]


def sweep_groups(folder: Path) -> tuple[str, list[Group], SettingTable]:
    """Title, groups and table of a sweep. Members without a logged step count in the table but belong to no group.

    Raises:
        ConfigError: no member has logged a step, or one holds a damaged file.
    """
    sweep = read_sweep(folder)
    if sweep is None:
        raise ConfigError(str(folder / SWEEP_FILE), "Cannot be read", "It says what the sweep is", "Restore it, or report its members")
    logged = [member.name for member in sweep.members if _has_logged(folder, member)]
    runs = {name: replace(load_run(folder / name), name=name) for name in logged}
    if not runs:
        way_out = f"Wait for the members; ngpt status {in_shell(str(folder))}"
        raise ConfigError(str(folder), "no logged step", "A report needs at least one", way_out)
    settings = by_seed(sweep.members)
    named = [(_name(sweep, members), tuple(runs[member.name] for member in members if member.name in runs)) for members in settings]
    groups = [Group(name, of_setting) for name, of_setting in named if of_setting]
    return f"{sweep.name}: {' x '.join(sweep.swept)}", groups, _table(sweep, settings, runs)


def member_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """The members of a sweep that have logged a step; the folder itself if it is not a sweep's."""
    sweep = read_sweep(Path(folder))
    if sweep is None:
        return [Path(folder)]
    return [Path(folder) / member.name for member in sweep.members if _has_logged(Path(folder), member)] or [Path(folder)]


def _has_logged(folder: Path, member: SweptRun) -> bool:
    metrics = folder / member.name / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def _name(sweep: Sweep, members: Sequence[SweptRun]) -> str:
    """A group's name: the member's name without the seed, or the sweep's name if only the seed differs."""
    if len(sweep.members) == len(members):
        return sweep.name
    seed = f"seed={members[0].values.get('train.seed')}"
    return "_".join(part for part in members[0].name.split("_") if part != seed) if len(members) > 1 else members[0].name


def _table(sweep: Sweep, settings: Sequence[Sequence[SweptRun]], runs: dict[str, Run]) -> SettingTable:
    validated = any(run.total("val_loss") is not None for run in runs.values())
    key = "val_loss" if validated else "train_loss"
    losses = [[loss for member in members if (loss := _final(runs.get(member.name), key)) is not None] for members in settings]
    means = [fmean(found) if found else math.inf for found in losses]
    comparable = len(settings) > 1 and not (validated and differ_in_text(runs.values(), "valid"))
    rows = [
        Setting(
            values=list(without_seed(members[0].values).values()),
            loss=_with_error(found),
            runs=str(len(members)) if len(found) == len(members) else f"{len(found)} of {len(members)}",
            best=comparable and math.isfinite(mean) and mean == min(means) and not _may_be_noise(found, losses),
        )
        for members, found, mean in zip(settings, losses, means, strict=True)
    ]
    what = "Validation loss" if validated else "Training loss, last"
    failed = [(member.name, member.why) for member in sweep.members if member.status == "failed"]
    return SettingTable([key for key in sweep.swept if key != "train.seed"], f"{what} (nats per token)", rows, failed)


def _may_be_noise(lowest: Sequence[float], losses: Sequence[Sequence[float]]) -> bool:
    """Whether another setting's mean is higher by no more than the noise of seeds explains."""
    return any(within_noise(lowest, others) for others in losses if others and fmean(others) != fmean(lowest))


def _final(run: Run | None, key: str) -> float | None:
    """The loss of a finished run; one still running says nothing about its setting yet."""
    if run is None or run.status.kind not in ("finished", "stopped"):
        return None
    value = run.total(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _with_error(losses: Sequence[float]) -> str:
    if not losses:
        return MISSING
    error = f" ± {stdev(losses) / math.sqrt(len(losses)):.4f}" if len(losses) > 1 else ""
    return f"{fmean(losses):.4f}{error}"
