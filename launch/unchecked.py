"""Megatron arguments that no list of ours knows: names and values are Megatron's own parser's to judge."""

import warnings

from ngpt.config.megatron_arguments import unchecked_names
from ngpt.config.schema import Config


def check_unchecked(config: Config) -> None:
    """Asks Megatron, which takes some 10 s to import, and only where a config has such arguments.

    Raises:
        ConfigError: a name that Megatron does not have, or a value that it does not take.
    """
    if names := unchecked_names(config.megatron):
        with warnings.catch_warnings(action="ignore"):  # about what Megatron misses: nothing is computed here
            from megatron_ext.training.bridge import to_argv

        to_argv({name: config.megatron[name] for name in names})
