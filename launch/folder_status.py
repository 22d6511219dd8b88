"""`ngpt status FOLDER`: a line for each run, sweep and study that a folder of them holds."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from ngpt.config.errors import ConfigError
from ngpt.durations import duration
from ngpt.sweeps import SWEEP_FILE, read_sweep

from .many import WAITING
from .run_folder import CONFIG_FILE, METRICS_FILE, first_failure, outcome_of
from .slurm.jobs import queued
from .status import state_of
from .study_shared import WORDS_FILE, words_of
from .sweep_status import in_columns, newest_records, sweep_status

_KINDS = {CONFIG_FILE: "run", SWEEP_FILE: "sweep", WORDS_FILE: "study"}  # of a folder that holds this file


@dataclass(frozen=True)
class Entry:
    """A run, or a group of runs.

    Attributes:
        name: of its folder, below the one that is listed.
        kind: run | sweep | study.
        state: of a run, or how many runs of a group are in which, in the words of `ngpt status` of it. A run of a study that reached
            its train.stop_after counts as finished: its trunks end there by plan.
        step, last_step: the newest logged, and the one that the run ends at; None for a group.
        train_loss: the newest, in nats per token; None for a group.
        age_s: seconds since the last line of metrics.
    """

    name: str
    kind: str
    state: str
    step: int | None = None
    last_step: int | None = None
    train_loss: float | None = None
    age_s: float | None = None


def entries(folder: Path) -> list[Entry]:
    """What a folder, or a folder in it, holds; [] if there is none of it."""
    kinds = dict(_found(folder))
    jobs: dict[Path, str] = {}
    with suppress(ConfigError):  # SLURM does not answer: what the folders say remains
        jobs = queued([run for place, kind in kinds.items() for run in _runs_of(place, kind)])
    return [_entry(place, str(place.relative_to(folder)), kind, jobs) for place, kind in kinds.items()]


def print_folder_status(folder: Path, found: list[Entry], as_json: bool) -> None:
    """Prints the entries of a folder as one JSON object or as a table."""
    if as_json:
        print(json.dumps({"folder": str(folder), "entries": [asdict(entry) for entry in found]}, indent=1))
        return
    rows = [("name", "kind", "step", "train loss", "age", "state"), *map(_cells, found)]
    print("\n".join(in_columns(rows)))


def _found(folder: Path, deeper: bool = True) -> Iterator[tuple[Path, str]]:
    for place in _folders(folder):
        if (kind := _kind(place)) is not None:
            yield place, kind
        elif deeper:
            yield from _found(place, deeper=False)


def _kind(place: Path) -> str | None:
    with suppress(OSError):
        return next((kind for file, kind in _KINDS.items() if (place / file).is_file()), None)
    return None


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, without hidden ones; [] if it cannot be read, or has been removed meanwhile."""
    with suppress(OSError):
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return []


def _entry(place: Path, name: str, kind: str, jobs: Mapping[Path, str]) -> Entry:
    if kind == "run":
        newest = next((record for record in newest_records(place / METRICS_FILE) if isinstance(record.get("step"), int)), {})
        loss = newest.get("train_loss")
        state, loss = _state(place, jobs.get(place)), loss if isinstance(loss, float) else None
        return Entry(name, kind, state, newest.get("step"), _last_step(place), loss, _age([place]))
    if kind == "sweep" and (sweep := read_sweep(place)) is not None:
        return Entry(name, kind, _counted(sweep_status(place)["counts"]), age_s=_age([place / member.name for member in sweep.members]))
    runs = _runs_of(place, kind)
    counts = Counter(_of_study(_state(run, jobs.get(run))) for run in runs)
    return Entry(name, kind, _counted(counts) if runs else "cannot be read", age_s=_age(runs))


def _state(run: Path, job: str | None) -> str:
    return state_of(run, job, outcome_of(run), first_failure(run)) if (run / CONFIG_FILE).exists() else WAITING


def _of_study(state: str) -> str:
    return "finished" if state == "stopped" else state


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _runs_of(place: Path, kind: str) -> list[Path]:
    """A run itself, or the runs of a study; [] of a sweep, which `sweep_status` asks for, and of a study that cannot be read."""
    if kind == "study":
        return [place / name for name in words_of(place)]
    return [place] if kind == "run" else []


def _last_step(run: Path) -> int | None:
    """Read without checking the config, which takes longer than all else."""
    with suppress(OSError, ValueError, yaml.YAMLError, AttributeError, TypeError, KeyError):
        train = yaml.safe_load((run / CONFIG_FILE).read_bytes())["train"]
        return train.get("stop_after") or train["steps"]
    return None


def _age(runs: Sequence[Path]) -> float | None:
    """Seconds since one of the runs has written metrics; None if none has."""
    times = []
    for run in runs:
        with suppress(OSError):
            times.append((run / METRICS_FILE).stat().st_mtime)
    return round(max(0.0, time.time() - max(times)), 1) if times else None


def _cells(entry: Entry) -> tuple[str, ...]:
    step = "" if entry.step is None else str(entry.step)
    steps = f"{step}/{entry.last_step}" if step and entry.last_step else step
    loss = "" if entry.train_loss is None else f"{entry.train_loss:.4f}"
    return entry.name, entry.kind, steps, loss, "" if entry.age_s is None else duration(entry.age_s), entry.state
