"""Fills in what a config leaves derived (null). Idempotent: a resolved config stays as it is."""

from pathlib import PurePath

from ngpt.config.errors import ConfigError
from ngpt.config.pattern import parse
from ngpt.config.schema import Config, ModelConfig

MAX_LAYERS = 10_000


def resolve(cfg: Config) -> None:
    """Replaces every derived null of `cfg`, in place. Nonsense is left for the checks to name."""
    _resolve_model(cfg.model)
    if not cfg.precision.num_layers_at_start_in_bf16 and not cfg.precision.num_layers_at_end_in_bf16:
        _count_blocks(cfg.model)
    if cfg.parallel.sequence_parallel is None:
        cfg.parallel.sequence_parallel = cfg.parallel.tensor > 1
    if cfg.run.dir is None:
        cfg.run.dir = str(PurePath(cfg.run.root) / cfg.run.name)
    if cfg.checkpoint.dir is None:
        cfg.checkpoint.dir = str(PurePath(cfg.run.dir) / "checkpoints")
    if cfg.data.cache_dir is None:
        cfg.data.cache_dir = str(PurePath(cfg.run.dir) / "data_cache")


def _resolve_model(model: ModelConfig) -> None:
    if model.num_query_groups is None:
        model.num_query_groups = model.num_attention_heads
    positive = model.hidden_size > 0 and model.num_attention_heads > 0
    if model.head_dim is None and positive and model.hidden_size % model.num_attention_heads == 0:
        model.head_dim = model.hidden_size // model.num_attention_heads
    if model.moe_ffn_hidden_size is None:
        model.moe_ffn_hidden_size = model.ffn_hidden_size
    if model.layer_pattern is None:
        if model.num_layers > MAX_LAYERS:  # the pattern would fill the memory before a check could name the number
            raise ConfigError("model.num_layers", model.num_layers, f"At most {MAX_LAYERS}", "Set fewer layers")
        model.layer_pattern = "*-" * model.num_layers


def _count_blocks(model: ModelConfig) -> None:
    """`num_layers` may also be the number of symbols, as Megatron counts a hybrid's layers, if nothing else counts blocks."""
    pattern = parse(model.layer_pattern)
    if model.num_layers == len(pattern.trunk):
        model.num_layers = len(pattern.blocks)
