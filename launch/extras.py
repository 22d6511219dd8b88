"""What a config needs and an installation may lack: packages of the optional extras (setup.py), and lm-eval's tasks."""

from importlib.util import find_spec
from pathlib import Path

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.evaluation.names import KEYS, check_names


def is_installed(module: str) -> bool:
    """Whether a module can be imported. It is not imported itself, but its parents are."""
    try:
        spec = find_spec(module)
    except ImportError:  # its parent is missing
        return False
    return spec is not None and spec.origin is not None  # a plain folder of that name, such as wandb's client leaves, has no origin


def check_extra(key: str, value: object, package: str, extra: str) -> None:
    """Checks that a package that a key needs is installed, without importing it.

    Raises:
        ConfigError: it is not installed.
    """
    if not is_installed(package):
        way_out = f"pip install 'ngpt-megatron[{extra}]', or in a checkout pip install -e '.[{extra}]'"
        raise ConfigError(key, value, f"It needs {package}, which is not installed", way_out)


def check_extras(config: Config) -> None:
    """Called before processes start, and before submitting a job that runs in this same installation.

    Raises:
        ConfigError: a package or a task is missing.
    """
    if config.train.eval_tasks:
        check_extra("train.eval_tasks", config.train.eval_tasks, "lm_eval", "eval")
        check_names(config.train.eval_tasks, list(map(Path, config.train.eval_tasks_include)), KEYS)
    if config.logging.wandb.mode != "disabled":
        check_extra("logging.wandb.mode", config.logging.wandb.mode, "wandb", "wandb")
