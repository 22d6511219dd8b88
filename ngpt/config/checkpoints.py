"""What a checkpoint folder holds, read from its files without torch."""

import re
from pathlib import Path

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config

TRACKER_FILE = "latest_checkpointed_iteration.txt"  # Megatron's: the newest finished checkpoint


def has_checkpoint(folder: str | Path) -> bool:
    """Whether Megatron finished at least one checkpoint in `folder`."""
    return (Path(folder) / TRACKER_FILE).is_file()


def newest_step(config: Config) -> int | None:
    """The step of the newest finished checkpoint that the run would continue from; None where there is none."""
    folder = Path(config.checkpoint.dir)
    tracker, saved = folder / TRACKER_FILE, sorted(path.name for path in folder.glob("iter_*") if re.fullmatch(r"iter_\d{7,18}", path.name))
    if not config.checkpoint.resume:
        return None
    if not tracker.exists():
        if saved:
            rule = f"it names the checkpoint to continue from, and {folder} holds {', '.join(saved)}"
            way_out = f"Write the step of an intact one into it, for instance {int(saved[-1][5:])}; or remove the folder to start again"
            raise ConfigError(str(tracker), "missing", rule, way_out)
        return None
    text = tracker.read_bytes()[:100].decode(errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,18}", text) or f"iter_{int(text):07d}" not in saved:
        rule = f"it must name one of the checkpoints beside it: {', '.join(saved) or 'there is none'}"
        raise ConfigError(str(tracker), text, rule, "Write the step of an intact one into it, or remove the folder to start again")
    return int(text)
