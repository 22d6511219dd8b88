"""Whether a run folder holds a run. One in which nothing was trained does not: the next run takes it over."""

import time
from pathlib import Path

from ngpt.config.checkpoints import has_checkpoint
from ngpt.config.compose import load
from ngpt.config.errors import ConfigError
from ngpt.locks import holder
from ngpt.progress import read_heartbeats

from .ending import summary_of
from .outcome import damage, read_outcome
from .run_folder import CONFIG_FILE, METRICS_FILE, first_failure
from .slurm.jobs import queued

HEARD_SECONDS = 60.0  # a rank that lives has left a heartbeat since; it leaves one every 5 s, and clocks differ


def holds_run(folder: Path) -> bool:
    """Whether a folder has a checkpoint or a recorded step, or a launch or job of it may live."""
    return has_trained(folder) or may_live(folder)


def has_trained(folder: Path, checkpoints: Path | None = None) -> bool:
    """Whether a folder has a checkpoint or a recorded step. Where damage hides that, it counts as trained.

    Args:
        checkpoints: one more folder whose checkpoints count; those of the folder itself and of its last launch always do.
    """
    try:
        if (folder / METRICS_FILE).stat().st_size > 0:
            return True
    except FileNotFoundError:
        pass
    outcome, summary = read_outcome(folder), summary_of(folder) or {}
    if damage(folder) or (outcome is not None and outcome.step) or summary.get("status", "failed") != "failed":
        return True  # that of a failure counts the steps of the checkpoint.load that it started from
    places = [folder / "checkpoints", checkpoints]
    if (folder / CONFIG_FILE).exists():
        try:
            places.append(Path(load(folder / CONFIG_FILE).checkpoint.dir))
        except ConfigError:
            return True
    return any(has_checkpoint(place) for place in places if place)


def may_live(folder: Path) -> bool:
    """Whether a launch holds the folder, or a job of it waits or runs. Heartbeats tell on file systems without locks."""
    if holder(folder) is not None:
        return True
    ended = read_outcome(folder) is not None or first_failure(folder) is not None
    if not ended and any(time.time() - beat.get("time", 0.0) < HEARD_SECONDS for beat in read_heartbeats(folder)):
        return True
    try:
        return bool(queued([folder]))
    except ConfigError:  # SLURM does not answer
        return True
