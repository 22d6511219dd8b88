"""Runs as data: one `Run` per folder, its series for the plots, and the rows of the tables that compare runs."""

import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ngpt.analysis import formats, metrics
from ngpt.analysis.metrics import measured, number
from ngpt.config.errors import ConfigError
from ngpt.config.identity import flatten
from ngpt.config.yaml_limits import check_yaml
from ngpt.sweeps import SWEEP_FILE

# Keys that name the run itself: they differ between any two runs and carry no information.
_IDENTITY_KEYS = frozenset({"run.name", "run.dir"})
_ABSENT = object()


@dataclass(frozen=True)
class Row:
    """A line of a comparison table, with one cell per run."""

    label: str
    cells: list[str]


@dataclass(frozen=True)
class Status:
    """How a run ended. `kind`: finished | stopped | failed | unfinished."""

    kind: str
    message: str


@dataclass(frozen=True)
class Run:
    """What a run folder holds. `summary`, `environment` and `sample` are None if the run has not written them."""

    directory: Path
    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    environment: dict[str, Any] | None
    sample: str | None

    @cached_property
    def flat_config(self) -> dict[str, Any]:
        return flatten(self.config)

    @cached_property
    def tokens(self) -> list[float]:
        """Tokens trained on up to each record."""
        return [number(record, "tokens") for record in self.metrics]

    @cached_property
    def training_seconds(self) -> list[float]:
        """Seconds spent in training steps up to each record, without start-up, validation, saving and interruptions."""
        seconds, timed_step, times = 0.0, 0, []
        for record in self.metrics:
            step_time = number(record, "step_time_s")
            if math.isfinite(step_time):
                seconds += (record["step"] - timed_step) * step_time
                timed_step = record["step"]
            times.append(seconds)
        return times

    def series(self, key: str, x: Sequence[float]) -> tuple[list[float], list[float]]:
        """The records that hold `key`, as (x, y).

        Args:
            key: A key of metrics.jsonl.
            x: One coordinate per record: `tokens` or `training_seconds`.

        Returns:
            Two lists of equal length; y is NaN if the run logged a non-finite value.
        """
        points = [(position, number(record, key)) for position, record in zip(x, self.metrics, strict=True) if measured(record, key)]
        return [position for position, _ in points], [value for _, value in points]

    def last(self, key: str) -> Any:
        """The newest value of `key` in the metrics: NaN if it was not finite, None if it was never measured."""
        return next((number(record, key) for record in reversed(self.metrics) if measured(record, key)), None)

    def total(self, key: str) -> Any:
        """`key` from the summary, or from the metrics if there is no summary that covers them."""
        value = None if self.status.kind == "unfinished" else self.summary.get(key)
        return self.last("step" if key == "steps" else key) if value is None else value

    @cached_property
    def span(self) -> tuple[datetime, datetime] | None:
        """When its last launch began and ended, as far as it is known; None where the start is not."""
        try:
            start = datetime.fromisoformat((self.environment or {})["started"])
        except (KeyError, TypeError, ValueError):
            return None
        with suppress(KeyError, TypeError, ValueError):
            if (end := datetime.fromisoformat((self.summary or {})["finished_at"])) >= start:
                return start, end
        return start, start + timedelta(seconds=self.training_seconds[-1])

    @property
    def progress(self) -> str:
        """The last logged step and the planned number of steps: `step 40 of 100`."""
        planned = self.flat_config.get("train.steps")
        return f"step {self.metrics[-1]['step']:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")

    @cached_property
    def status(self) -> Status:
        reached, progress = self.metrics[-1]["step"], self.progress
        # a summary older than the metrics is from before the run was resumed
        covered = reached if self.summary is None else self.summary.get("steps", reached)
        if self.summary is None or not isinstance(covered, int) or covered < reached:
            return Status("unfinished", f"No summary yet: still running, or ended without one. Last logged {progress}.")
        kind = str(self.summary.get("status", "unknown"))
        if kind == "finished":
            return Status(kind, f"Finished at {progress}.")
        if kind == "stopped":
            return Status(kind, f"Stopped before the end of its schedule, at {progress}.")
        return Status("failed", f"Status {kind}, last logged {progress}. {self.summary.get('error', 'See console.log.')}")


def load_run(directory: str | os.PathLike[str]) -> Run:
    """Read a run folder; a run that has not finished needs only config.yaml and one record in metrics.jsonl.

    Raises:
        ConfigError: The folder is not a run, has no metrics yet, or holds a damaged file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(str(directory), "no such folder", "A report is made of run folders", "Give a folder written by `ngpt train`")
    if not (directory / "config.yaml").is_file():
        runs = sorted(str(path.parent) for file in ("config.yaml", SWEEP_FILE) for path in directory.glob(f"*/{file}"))
        way_out = f"Give one or more of: {', '.join(runs)}" if runs else "Give a folder written by `ngpt train`"
        raise ConfigError(str(directory), "a folder without config.yaml", "A run folder holds config.yaml and metrics.jsonl", way_out)
    records = metrics.read(directory / "metrics.jsonl")
    if not records:
        path = str(directory / "metrics.jsonl")
        raise ConfigError(path, "no logged step", "A report needs at least one", "Wait for logging.interval steps, or see console.log")
    config = _read_config(directory / "config.yaml")
    sample = directory / "sample.txt"
    return Run(
        directory=directory,
        name=str(flatten(config).get("run.name") or directory.resolve().name),
        config=config,
        metrics=records,
        summary=_read_json(directory / "summary.json"),
        environment=_read_json(directory / "environment.json"),
        sample=sample.read_text(encoding="utf-8", errors="replace") if sample.is_file() else None,
    )


def load_runs(directories: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read several run folders; runs with the same name are named by their folders instead. Raises as `load_run`."""
    runs = [load_run(directory) for directory in directories]
    names = [run.name for run in runs]
    return [replace(run, name=str(run.directory)) if names.count(run.name) > 1 else run for run in runs]


def choices(run: Run) -> dict[str, Any]:
    """The config of a run by dotted keys, without its name. Paths inside its own folder are relative to that folder."""
    return {key: _inside(value, run) for key, value in run.flat_config.items() if key not in _IDENTITY_KEYS}


def config_diff(runs: Sequence[Run]) -> list[Row]:
    """The config keys in which the runs differ, apart from their names and paths inside their own folders."""
    flats = [choices(run) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    rows = []
    for key in keys:
        values = [flat.get(key, _ABSENT) for flat in flats]
        if any(value != values[0] for value in values):
            rows.append(Row(key, ["(absent)" if value is _ABSENT else formats.plain(value) for value in values]))
    return rows


def environment_rows(runs: Sequence[Run]) -> list[Row]:
    """Every entry of environment.json, git state first."""
    flats = [flatten(run.environment or {}) for run in runs]
    keys = sorted(dict.fromkeys(key for flat in flats for key in flat), key=lambda key: not key.startswith("git"))
    return [Row(key, [formats.plain(flat[key]) if key in flat else formats.MISSING for flat in flats]) for key in keys]


def _inside(value: Any, run: Run) -> Any:
    """A value; a path inside the run's own folder becomes relative to it, since it is the same choice in every run."""
    own = run.flat_config.get("run.dir")
    if isinstance(own, str) and isinstance(value, str):
        return re.sub(rf"^{re.escape(own)}(?=/|$)", "<run.dir>", value)
    return value


def _read_config(path: Path) -> dict[str, Any]:
    try:
        check_yaml(path)
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(str(path), error, "Must be the YAML written by `ngpt train`", "Restore the file") from None
    if not isinstance(config, dict):
        raise ConfigError(str(path), f"a {type(config).__name__}", "Must be a mapping, as `ngpt train` writes it", "Restore the file")
    return config


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), error, "Must be the JSON written by `ngpt train`", "Delete the file to report without it") from None
    if not isinstance(content, dict):
        raise ConfigError(str(path), f"a {type(content).__name__}", "Must be a JSON object", "Delete the file to report without it")
    return content
