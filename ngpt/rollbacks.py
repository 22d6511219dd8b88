"""Rollbacks: a run goes back to its newest checkpoint and goes on behind the batches that it left.

The ranks end with an error; who starts them again (the launcher, or a scheduler) finds in `<run.dir>/rollbacks.json` from which step the
run went back. A launch that continues from a checkpoint before that step takes up the count of steps and the order of samples behind it:
the batches between are never seen again.
"""

import json
import time
from pathlib import Path
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.files import replacing

ROLLBACKS_FILE = "rollbacks.json"


class RolledBack(RuntimeError):
    """The run ends here and goes on from its newest checkpoint."""


class RefusedStep(RuntimeError):
    """The run stops before a step that must not be trained on."""


def read_rollbacks(run_dir: Path) -> list[dict[str, Any]]:
    """Of the whole run, oldest first: from (step whose batch was refused), to (step of the checkpoint then), why, time.

    Raises:
        ConfigError: the file is damaged.
    """
    path = run_dir / ROLLBACKS_FILE
    if not path.exists():
        return []
    try:
        rollbacks = json.loads(path.read_text(encoding="utf-8"))["rollbacks"]
        return [rollback | {"from": int(rollback["from"]), "to": int(rollback["to"])} for rollback in rollbacks]
    except (ValueError, KeyError, TypeError) as error:
        rule = "it says behind which batches the run goes on"
        way_out = "Restore it; or remove it, and the refused batches are seen again"
        raise ConfigError(str(path), f"unreadable: {error!r}", rule, way_out) from None


def record_rollback(run_dir: Path, left: int, checkpoint: int, why: str) -> None:
    """Called on one rank."""
    rollback = {"from": left, "to": checkpoint, "why": why, "time": time.time()}
    content = {"rollbacks": [*read_rollbacks(run_dir), rollback]}
    with replacing(run_dir / ROLLBACKS_FILE) as stream:
        stream.write((json.dumps(content) + "\n").encode())


def refusal(rollbacks: list[dict[str, Any]], checkpoint: int | None, limit: int) -> str | None:
    """Why the run must not go back to a checkpoint once more; None where it may.

    Args:
        checkpoint: The newest one's step; None where there is none.
        limit: How often a run may go back to one and the same checkpoint.
    """
    if checkpoint is None:
        return "there is no checkpoint to go back to"
    earlier = sum(rollback["to"] == checkpoint for rollback in rollbacks)
    if earlier >= limit:
        return f"the run has gone back to step {checkpoint} as often as train.max_rollbacks={limit} allows"
    return None


def resume_step(rollbacks: list[dict[str, Any]], checkpoint: int) -> int:
    """The step behind which a launch that loads the checkpoint of a step goes on: behind every batch that was refused after it.

    A checkpoint from before the one that a rollback went to is followed as it is: its own future may be another.
    """
    return max([rollback["from"] for rollback in rollbacks if rollback["to"] <= checkpoint < rollback["from"]], default=checkpoint)
