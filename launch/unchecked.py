"""Megatron arguments that a config leaves unchecked: names and values are Megatron's own parser's to judge."""

import warnings

from ngpt.config.megatron_arguments import UNCHECKED, passed_on
from ngpt.config.schema import Config


def check_unchecked(config: Config) -> None:
    """Asks Megatron, which takes some 10 s to import, and only where a config has such arguments.

    Raises:
        ConfigError: a name that Megatron does not have, or a value that it does not take.
    """
    if config.megatron.get(UNCHECKED):
        with warnings.catch_warnings(action="ignore"):  # about what Megatron misses: nothing is computed here
            from megatron_ext.training.bridge import to_argv

        to_argv(passed_on(config.megatron))
