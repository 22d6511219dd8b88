"""The trainer's model of a config, as Megatron's own set-up builds it."""

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer

from megatron_ext.device import on_gpu
from megatron_ext.training.bridge import setup_megatron
from ngpt.config import Config
from ngpt.config.executor import choose_backend


def load_model(cfg: Config) -> torch.nn.Module:
    """The model of a single-process config, with the weights of its newest checkpoint where there is one, in evaluation mode."""
    backend = choose_backend(cfg.model.transformer_impl, on_gpu())
    weights_only = dict(skip_train=True, no_load_optim=True, no_load_rng=True, eval_iters=0)
    _, container = setup_megatron(cfg, backend, save=None, save_interval=None, tensorboard_dir=None, **weights_only)
    initialize_megatron()
    chunks, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder, cfg_container=container, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    return chunks[0].eval()
