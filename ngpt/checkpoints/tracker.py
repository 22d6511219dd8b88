"""The tracker: the file that names the published checkpoint of a folder."""

import re
from dataclasses import dataclass
from pathlib import Path

from ngpt.files import sync, write_synced

TRACKER_FILE = "latest_checkpointed_iteration.txt"  # Megatron's name, and its content: the step in decimal
MAX_DIGITS = 12


@dataclass(frozen=True)
class Tracker:
    """What a tracker file says.

    Attributes:
        path: The file.
        step: The step it names; None where there is no file, or none that can be read.
        problem: Why it names no step; None where it does, or where there is no file.
    """

    path: Path
    step: int | None = None
    problem: str | None = None

    @property
    def is_missing(self) -> bool:
        return self.step is None and self.problem is None


def read(folder: Path | str) -> Tracker:
    """Reads the tracker of a checkpoints folder. Any content gives an answer."""
    path = Path(folder) / TRACKER_FILE
    try:
        with path.open("rb") as stream:
            content = stream.read(1024).strip()
    except (FileNotFoundError, NotADirectoryError):
        return Tracker(path)
    except OSError as error:
        return Tracker(path, problem=error.strerror or str(error))
    if not content:
        return Tracker(path, problem="empty")
    if not re.fullmatch(rb"[0-9]{1,%d}" % MAX_DIGITS, content):
        shown = content[:40].decode("utf-8", "backslashreplace")
        return Tracker(path, problem=f"{shown!r} is not the step of a checkpoint")
    return Tracker(path, step=int(content))


def stage(folder: Path, step: int) -> Path:
    """Writes the coming tracker beside the present one. What can fail for lack of space fails here, before anything is changed."""
    staged = folder / (TRACKER_FILE + ".partial")
    write_synced(staged, str(step))
    return staged


def replace(folder: Path, staged: Path) -> None:
    """Makes the staged tracker the tracker, in one step."""
    staged.replace(folder / TRACKER_FILE)
    sync(folder)
