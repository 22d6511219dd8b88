"""Whether a launch may go on in its run folder, and what it is told there."""

from pathlib import Path

from ngpt.config.checkpoints import (
    check_has_optimizer,
    check_same_model,
    check_unmixed,
    config_of,
    is_own,
    newest_step,
    start_checkpoint,
)
from ngpt.config.compose import load
from ngpt.config.errors import ConfigError
from ngpt.config.identity import diff, listed, model_defining
from ngpt.config.kept_keys import check_kept_keys
from ngpt.config.schema import Config

from .resume_checks import notes
from .run_folder import CONFIG_FILE


def check_resumable(config: Config) -> None:
    """Refuses a run folder or initial weights of a different model: checkpoints and metrics would not fit.

    Raises:
        ConfigError: lists every model-defining key that differs, with its old and new value.
    """
    own = Path(config.run.dir) / CONFIG_FILE
    if own.exists() and (changes := diff(model_defining(load(own)), model_defining(config))):
        raise ConfigError(
            "run.dir",
            f"{config.run.dir} holds a run of another model ({listed(changes)})",
            "A run keeps its model when it resumes",
            "Give the new run a name of its own, run.name=NAME, or remove the folder",
        )
    check_unmixed(config)
    start = start_checkpoint(config)
    if start is None:
        return
    check_same_model(config, start)
    saved = config_of(start)
    if is_own(config, start):
        saved = saved or (load(own) if own.exists() else None)
    elif not config.checkpoint.load_optimizer:
        return
    check_has_optimizer(start)
    if saved is not None:
        check_kept_keys(saved, config, start.folder)


def resume_notes(config: Config) -> list[str]:
    """Notes on the data of a run that resumes.

    Raises:
        ConfigError: its training data was prepared again since the folder's last launch.
    """
    own = Path(config.run.dir) / CONFIG_FILE
    return list(notes(config, own)) if own.exists() and newest_step(config) is not None else []
