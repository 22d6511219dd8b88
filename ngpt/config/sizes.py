"""Sizes that follow from a resolved config: processes, batches, tokens, padded vocabulary."""

from ngpt.config.schema import Config, ModelConfig


def world_size(cfg: Config) -> int:
    """Processes of the run."""
    return cfg.cluster.nodes * cfg.cluster.gpus_per_node


def model_parallel_size(cfg: Config) -> int:
    """Processes that hold one copy of the model and share one micro-batch."""
    return cfg.parallel.tensor * cfg.parallel.pipeline * cfg.parallel.context


def expert_tensor_size(cfg: Config) -> int:
    """Processes that share one expert."""
    return cfg.parallel.expert_tensor or cfg.parallel.tensor


def data_parallel_size(cfg: Config) -> int:
    """Copies of the model, each with its own micro-batches."""
    return world_size(cfg) // model_parallel_size(cfg)


def micro_batches_per_step(cfg: Config) -> int:
    """Micro-batches that each data-parallel rank accumulates in one step."""
    return cfg.train.global_batch_size // (cfg.train.micro_batch_size * data_parallel_size(cfg))


def tokens_per_step(cfg: Config) -> int:
    """Tokens of one global batch."""
    return cfg.train.global_batch_size * cfg.train.seq_length


def wsd_decay_steps(cfg: Config) -> int:
    """Steps of wsd's decay at the end of the run."""
    return round(cfg.schedule.decay_fraction * cfg.train.steps) if cfg.schedule.decay == "wsd" else 0


def last_low_precision_step(steps: int, bf16_tail: float) -> int:
    """The last of a run's steps before the tail that trains in high precision."""
    return round(steps * (1 - bf16_tail))


def pipeline_stages(cfg: Config) -> int:
    """Model chunks over all pipeline ranks; virtual pipelining puts several on a rank."""
    return cfg.parallel.pipeline * (cfg.parallel.virtual_pipeline or 1)


def padded_vocab_size(model: ModelConfig) -> int:
    """Rows of the embedding and of the output layer: `vocab_size` rounded up, the same at every tensor parallel size."""
    return round_up(model.vocab_size, model.vocab_padding_multiple)


def round_up(size: int, multiple: int) -> int:
    """The next multiple at or above `size`."""
    return -(-size // multiple) * multiple
