"""Which checkpoint a config starts from, judged by names and sizes, and whether it is of the same model."""

import functools
from pathlib import Path

from ngpt.checkpoints import manifest
from ngpt.checkpoints.choice import Choice, choose, choose_by_sizes, is_empty, listing
from ngpt.checkpoints.manifest import CONFIG_FILE
from ngpt.checkpoints.tracker import TRACKER_FILE
from ngpt.config.compose import load
from ngpt.config.errors import ConfigError
from ngpt.config.identity import diff, function_defining, listed, model_defining
from ngpt.config.schema import Config

READING_THREADS = 8


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
        raise ConfigError("checkpoint.load", checkpoint.load, f"It holds no finished checkpoint ({TRACKER_FILE} is missing)", way_out)
    return found


def newest_step(config: Config) -> int | None:
    """The step of the checkpoint that the run would continue from; None where there is none."""
    own = own_checkpoint(config)
    return None if own is None else own.step


def newest_verified_step(config: Config) -> int | None:
    """`newest_step` after reading every byte, which takes minutes for a large checkpoint."""
    checkpoint = config.checkpoint
    choice = choose(listing(checkpoint.dir), checkpoint.fallback, functools.partial(manifest.verify, threads=READING_THREADS))
    return None if choice is None else choice.step


def check_same_model(config: Config, choice: Choice) -> None:
    """Refuses a checkpoint of another model, judged by the config that it carries, wherever its folder is now.

    A checkpoint from before they carried a config is judged by the run folder that it lies in, if any.

    Raises:
        ConfigError: with every model-defining key that differs, old and new.
    """
    folder, own = choice.folder.parent, is_own(config, choice)
    source = choice.folder / CONFIG_FILE
    if not source.exists():
        source = folder.parent / CONFIG_FILE
        if own or not source.exists():  # a run folder's own config is compared in any case
            return
    saved = load(source)
    changes = diff(model_defining(saved), model_defining(config))
    if own and changes:
        got, way_out = f"{choice.folder} holds another model", "Restore the keys, or give the new run a name of its own, run.name=NAME"
        raise ConfigError("checkpoint.dir", f"{got} ({listed(changes)})", "A run goes on with its own model", way_out)
    if config.checkpoint.load_optimizer:
        changes = {key: change for key, change in changes.items() if key.startswith("model.")}  # weights may learn another length
    else:
        changes = diff(function_defining(saved), function_defining(config))
    if changes:
        got, way_out = f"{folder} holds another model", f"Set the keys as in {source}, or load another checkpoint"
        raise ConfigError("checkpoint.load", f"{got} ({listed(changes)})", "A run starts from weights of its own model", way_out)


def check_has_optimizer(choice: Choice) -> None:
    """Raises ConfigError if a checkpoint holds weights alone, but the run needs its optimizer state."""
    if manifest.holds_weights_alone(choice.folder):
        rule = "A run that resumes, or loads with checkpoint.load_optimizer=true, goes on with its optimizer's state"
        way_out = f"Start a new run.name from it: checkpoint.load={choice.folder.parent} checkpoint.load_optimizer=false"
        raise ConfigError(str(choice.folder), "it holds weights alone", rule, way_out)


def config_of(choice: Choice) -> Config | None:
    """The config that a checkpoint was saved with; None if it is from before checkpoints carried one, or if its config is
    damaged, which loading it reports."""
    source = choice.folder / CONFIG_FILE
    try:
        return load(source) if source.exists() else None
    except ConfigError:
        return None


def check_unmixed(config: Config) -> None:
    """Refuses a run that starts anew among another run's checkpoints and metrics: they would be mixed, and the metrics lost.

    Raises:
        ConfigError: checkpoint.resume=false, and the folder holds checkpoints.
    """
    if not config.checkpoint.resume and has_checkpoint(config.checkpoint.dir):
        rule = f"{config.checkpoint.dir} holds checkpoints, and what starts anew would mix with them"
        raise ConfigError("checkpoint.resume", False, rule, "Set it to true to go on; or give the new run a name of its own, run.name=NAME")


def is_own(config: Config, choice: Choice) -> bool:
    """Whether the checkpoint is of the run itself, and not of `checkpoint.load`."""
    return choice.folder.parent == Path(config.checkpoint.dir)
