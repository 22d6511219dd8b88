"""What a config needs that an installation may lack: packages of the optional extras (setup.py)."""

import importlib.util

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config


def check_extra(key: str, value: object, package: str, extra: str) -> None:
    """Raises a ConfigError where a key needs a package that is not installed."""
    if importlib.util.find_spec(package) is None:
        way_out = f"pip install 'ngpt-megatron[{extra}]', or from a checkout pip install -e '.[{extra}]'"
        raise ConfigError(key, value, f"It needs {package}, which is not installed", way_out)


def check_extras(config: Config) -> None:
    """Called before processes start."""
    if config.train.eval_tasks:
        check_extra("train.eval_tasks", config.train.eval_tasks, "lm_eval", "eval")
