"""Megatron arguments that a config leaves unchecked: Megatron's own parser judges their names and values."""

import warnings

from ngpt.config.megatron_arguments import UNCHECKED, passed_on
from ngpt.config.schema import Config


def check_unchecked(config: Config) -> None:
    """Checks them with Megatron, which takes about 10 s to import; only if the config has such arguments.

    Raises:
        ConfigError: a name that Megatron does not have, or a value that it does not take.
    """
    if config.megatron.get(UNCHECKED):
        with warnings.catch_warnings(action="ignore"):  # warnings about packages that Megatron misses: nothing is computed here
            from megatron_ext.training.bridge import to_argv

        to_argv(passed_on(config.megatron))
