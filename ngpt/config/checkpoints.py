"""Which checkpoint a config starts from, judged by names and sizes."""

from pathlib import Path

from ngpt.checkpoints.choice import Choice, choose_by_sizes, is_empty, listing
from ngpt.checkpoints.tracker import TRACKER_FILE
from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config


def has_checkpoint(folder: str | Path) -> bool:
    """Whether a checkpoint was ever published in `folder`, whatever happened to it since."""
    return not is_empty(listing(folder))


def own_checkpoint(config: Config) -> Choice | None:
    """The checkpoint of its own that the run continues from; None where it starts anew.

    Raises:
        ConfigError: no published checkpoint is intact.
    """
    checkpoint = config.checkpoint
    return choose_by_sizes(checkpoint.dir, checkpoint.fallback, checkpoint.verify) if checkpoint.resume else None


def start_checkpoint(config: Config) -> Choice | None:
    """The checkpoint that the run loads: its own, else the one of `checkpoint.load`; None where it starts from random weights.

    Raises:
        ConfigError: no published checkpoint is intact, or checkpoint.load holds none.
    """
    own, checkpoint = own_checkpoint(config), config.checkpoint
    if own is not None or checkpoint.load is None:
        return own
    found = choose_by_sizes(checkpoint.load, checkpoint.fallback, checkpoint.verify)
    if found is None:
        inside = Path(checkpoint.load) / "checkpoints"
        way_out = f"Set checkpoint.load={inside}" if has_checkpoint(inside) else "Name the checkpoints folder of a run that saved one"
        raise ConfigError("checkpoint.load", checkpoint.load, f"it holds no finished checkpoint ({TRACKER_FILE} is missing)", way_out)
    return found


def newest_step(config: Config) -> int | None:
    """The step of the checkpoint that the run would continue from; None where there is none."""
    own = own_checkpoint(config)
    return None if own is None else own.step
