"""How a launch ended. The ranks say it in the run folder, since torchrun and srun take any other code than 0 for a failure.

`outcome.json` is written by rank 0 once all is saved (by any rank that leaves during start-up) and removed by the next launch.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ngpt.progress import write_json

OUTCOME_FILE = "outcome.json"
SIGNALLED = "signalled"
SIGNALLED_CODE = 75  # EX_TEMPFAIL: the same command goes on; schedulers requeue on it


@dataclass(frozen=True)
class Outcome:
    """The end of a launch.

    Attributes:
        status: finished | stopped (train.stop_after reached) | signalled (a signal asked for it).
        step: the last that was trained; None where the launch ended during start-up.
        signal: "SIGTERM", ...; None where no signal reached the rank that tells.
        saved: whether that step is in a checkpoint.
    """

    status: str
    step: int | None = None
    signal: str | None = None
    saved: bool = False

    @property
    def exit_code(self) -> int:
        """Of `ngpt train`."""
        return SIGNALLED_CODE if self.status == SIGNALLED else 0

    @property
    def left_during_start_up(self) -> bool:
        """Whether a rank was told to leave before training started."""
        return self.status == SIGNALLED and self.step is None

    @property
    def line(self) -> str | None:
        """What a person is told where a signal ended the launch."""
        if self.status != SIGNALLED:
            return None
        if self.step is None:
            reached = "during start-up"
        else:
            reached = f"after step {self.step}, {'which is saved' if self.saved else 'not saved: this run writes no checkpoints'}"
        return f"ended by {self.signal or 'a signal'} {reached}; the same command goes on"


def record_outcome(folder: Path, outcome: Outcome) -> None:
    """Writes it whole or not at all."""
    write_json(folder / OUTCOME_FILE, asdict(outcome))


def read_outcome(folder: Path) -> Outcome | None:
    """What the last launch said; None where it did not end by itself."""
    try:
        return Outcome(**json.loads((folder / OUTCOME_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
