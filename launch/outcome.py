"""How a launch ended. The ranks record it in the run folder, since torchrun and srun treat any exit code but 0 as a failure.

Rank 0 writes `outcome.json` once everything is saved. During start-up, any rank that leaves writes it. The next launch removes it.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ngpt.progress import write_json

OUTCOME_FILE = "outcome.json"
SIGNALLED = "signalled"
SIGNALLED_CODE = 75  # EX_TEMPFAIL: the same command continues the run; schedulers requeue on it


@dataclass(frozen=True)
class Outcome:
    """The end of a launch.

    Attributes:
        status: finished | stopped (train.stop_after reached) | signalled (a signal asked for it).
        step: the last trained step; None if the launch ended during start-up.
        signal: "SIGTERM", ...; None if no signal reached the rank that writes this.
        saved: whether that step is in a checkpoint.
    """

    status: str
    step: int | None = None
    signal: str | None = None
    saved: bool = False

    @property
    def exit_code(self) -> int:
        """The exit code of `ngpt train`."""
        return SIGNALLED_CODE if self.status == SIGNALLED else 0

    @property
    def left_during_start_up(self) -> bool:
        """Whether a rank was told to leave before training started."""
        return self.status == SIGNALLED and self.step is None

    @property
    def line(self) -> str | None:
        """What a person is told if a signal ended the launch."""
        if self.status != SIGNALLED:
            return None
        if self.step is None:
            reached = "during start-up"
        else:
            reached = f"after step {self.step}, {'which is saved' if self.saved else 'not saved: this run writes no checkpoints'}"
        return f"ended by {self.signal or 'a signal'} {reached}; the same command goes on"


def record_outcome(folder: Path, outcome: Outcome) -> None:
    """Writes the outcome atomically."""
    write_json(folder / OUTCOME_FILE, asdict(outcome))


def read_outcome(folder: Path) -> Outcome | None:
    """The outcome that the last launch recorded; None if it recorded none, or `damage` says that its record cannot be read."""
    with suppress(OSError, ValueError, TypeError):
        return _read(folder)
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with the record of the last launch's outcome; None if there is none, or nothing is wrong."""
    try:
        _read(folder)
    except OSError:
        return None
    except (ValueError, TypeError):
        what = "Damaged, so that how the last launch ended is not known"
        way_out = "The next launch writes it anew: start the run again; if nothing is left to train, remove the file"
        return f"{folder / OUTCOME_FILE}: {what}. {way_out}"
    return None


def _read(folder: Path) -> Outcome:
    return Outcome(**json.loads((folder / OUTCOME_FILE).read_text(encoding="utf-8")))
