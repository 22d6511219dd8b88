"""What commands that use a trained model share: what a path is, and the device."""

from pathlib import Path

from ngpt.config.errors import ConfigError
from ngpt.config.one_process import CONFIG_FILE
from ngpt.sweeps import way_to_a_run


def is_run(path: Path, step: int | None) -> bool:
    """Whether a folder is a run; otherwise transformers can open it.

    Raises:
        ConfigError: it is neither, or --step is given for a folder without steps.
    """
    if (path / CONFIG_FILE).exists():
        return True
    if not (path / "config.json").exists():
        rule = "A run folder, or one that transformers opens, is needed"
        raise ConfigError(str(path), f"no {CONFIG_FILE} and no config.json there", rule, way_to_a_run(path))
    if step is not None:
        raise ConfigError("--step", step, f"{path} is no run and has one set of weights", "Leave it out")
    return False


def device_of(name: str) -> str:
    """torch's name for the device that --device names.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", name, "torch sees no GPU here", "Set --device cpu, or leave it out")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def quiet_transformers() -> None:
    """Turns off transformers' warnings and progress bars: the commands say themselves what a person should know."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
