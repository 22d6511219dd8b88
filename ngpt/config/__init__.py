"""The configuration of a run: composed from `conf/`, checked, written and read back. Imports no torch."""

from ngpt.config.compose import compose, dump, load, to_yaml
from ngpt.config.errors import ConfigError, ConfigErrors
from ngpt.config.folders import config_dir
from ngpt.config.identity import diff, flatten, model_defining
from ngpt.config.schema import Config
from ngpt.config.sizes import data_parallel_size, micro_batches_per_step, padded_vocab_size, pipeline_stages, tokens_per_step, world_size

__all__ = [
    "Config",
    "ConfigError",
    "ConfigErrors",
    "compose",
    "config_dir",
    "data_parallel_size",
    "diff",
    "dump",
    "flatten",
    "load",
    "micro_batches_per_step",
    "model_defining",
    "padded_vocab_size",
    "pipeline_stages",
    "to_yaml",
    "tokens_per_step",
    "world_size",
]
