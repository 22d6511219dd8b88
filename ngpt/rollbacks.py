"""Rollbacks: a run goes back to its newest checkpoint and skips the batches seen since.

The ranks end with an error. `<run.dir>/rollbacks.json` tells whoever starts them again (the launcher, or a scheduler) from which step
the run went back. A launch from a checkpoint before that step continues the step count and the sample order after it. The batches in
between are never seen again.
"""

import json
import time
from pathlib import Path
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.files import replacing

ROLLBACKS_FILE = "rollbacks.json"


class RolledBack(RuntimeError):
    """The run ends here and continues from its newest checkpoint."""


class RefusedStep(RuntimeError):
    """The run stops before a step that must not be trained on."""


def read_rollbacks(run_dir: Path) -> list[dict[str, Any]]:
    """The whole run's, oldest first: from (step whose batch was refused), to (step of the checkpoint then), why, time.

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
        rule = "It says behind which batches the run goes on"
        way_out = "Restore it; or remove it, and the refused batches are seen again"
        raise ConfigError(str(path), f"unreadable: {error!r}", rule, way_out) from None


def record_rollback(run_dir: Path, left: int, checkpoint: int, why: str) -> None:
    """Called on one rank."""
    rollback = {"from": left, "to": checkpoint, "why": why, "time": time.time()}
    content = {"rollbacks": [*read_rollbacks(run_dir), rollback]}
    with replacing(run_dir / ROLLBACKS_FILE) as stream:
        stream.write((json.dumps(content) + "\n").encode())


def refusal(rollbacks: list[dict[str, Any]], checkpoint: int | None, limit: int) -> str | None:
    """Why the run must not go back to a checkpoint again; None if it may.

    Args:
        checkpoint: The newest one's step; None where there is none.
        limit: How often a run may go back to the same checkpoint.
    """
    if checkpoint is None:
        return "there is no checkpoint to go back to"
    earlier = sum(rollback["to"] == checkpoint for rollback in rollbacks)
    if earlier >= limit:
        return f"the run has gone back to step {checkpoint} as often as train.max_rollbacks={limit} allows"
    return None


def resume_step(rollbacks: list[dict[str, Any]], checkpoint: int) -> int:
    """The step after which a launch that loads `checkpoint` continues: after every batch that was refused since that step.

    A checkpoint older than the one that a rollback went to is continued as it is: its future may differ.
    """
    return max([rollback["from"] for rollback in rollbacks if rollback["to"] <= checkpoint < rollback["from"]], default=checkpoint)
