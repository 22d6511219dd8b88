"""Text from a trained run: the newest checkpoint on one process, one whole forward pass a token.

Meant for a look at what a run has learned. There is no key-value cache; serving belongs to other tools.
"""

import copy
import os
from pathlib import Path

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer

from megatron_ext.layers.backend import choose_backend
from megatron_ext.training.bridge import setup_megatron
from megatron_ext.training.checkpoint_load import checked_loading
from megatron_ext.training.run import megatron_log
from ngpt.config import Config, ConfigError, load
from ngpt.config.checkpoints import own_checkpoint
from ngpt.config.pattern import without_cuts
from ngpt.data.manifest import split_of
from ngpt.data.tokenizers import Tokenizer, from_config, from_manifest

TEMPERATURE = 0.8
SEED = 0


def main(run_dir: Path, prompt: str, tokens: int) -> None:
    """Print `prompt` and its continuation, and keep it as sample.txt in the run folder.

    Args:
        run_dir: a run with at least one finished checkpoint.
        prompt: text to continue; empty: a new document.
        tokens: tokens to generate at most; generation ends at an end-of-document token.

    Raises:
        ConfigError: the run has no checkpoint, or its data or tokenizer are gone.
    """
    cfg = _on_one_process(load(Path(run_dir) / "config.yaml"))
    inside = os.path.relpath(cfg.checkpoint.dir, cfg.run.dir)
    if not inside.startswith(".."):  # the run's own folder, wherever it is now
        cfg.checkpoint.dir = str(Path(run_dir) / inside)
    cfg.run.dir = str(run_dir)
    if own_checkpoint(cfg) is None:
        raise ConfigError(str(cfg.checkpoint.dir), "no finished checkpoint", "sampling needs one", "Train with checkpoint.save_at_end=true")
    tokenizer = from_config(cfg.tokenizer) if cfg.data.mock else from_manifest(split_of(cfg.data.train[0].path)[0])
    with megatron_log(Path(run_dir) / "logs" / "megatron-sample.log") as say:
        with checked_loading(cfg, say):
            model = load_model(cfg)
        text = generate(model, tokenizer, prompt, tokens, cfg.train.seq_length, cfg.model.vocab_size)
        say(text)
    (Path(run_dir) / "sample.txt").write_text(text, encoding="utf-8")


def _on_one_process(cfg: Config) -> Config:
    cfg = copy.deepcopy(cfg)
    cfg.parallel.tensor = cfg.parallel.pipeline = cfg.parallel.context = cfg.parallel.expert = 1
    cfg.parallel.virtual_pipeline = cfg.parallel.expert_tensor = None
    cfg.model.layer_pattern = without_cuts(cfg.model.layer_pattern)
    cfg.parallel.sequence_parallel = cfg.parallel.overlap_grad_reduce = cfg.parallel.overlap_param_gather = False
    cfg.megatron.pop("tp_comm_overlap", None)
    cfg.cluster.nodes = cfg.cluster.gpus_per_node = 1
    cfg.train.micro_batch_size = cfg.train.global_batch_size = 1
    cfg.checkpoint.resume = True
    cfg.checkpoint.async_save = False
    return cfg


def load_model(cfg: Config) -> torch.nn.Module:
    """The model of a single-process config with the weights of its newest checkpoint, in evaluation mode."""
    backend = choose_backend(cfg.model.transformer_impl)
    weights_only = dict(skip_train=True, no_load_optim=True, no_load_rng=True, eval_iters=0)
    _, container = setup_megatron(cfg, backend, save=None, save_interval=None, tensorboard_dir=None, **weights_only)
    initialize_megatron()
    chunks, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder, cfg_container=container, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    return chunks[0].eval()


@torch.no_grad()
def generate(model: torch.nn.Module, tokenizer: Tokenizer, prompt: str, tokens: int, window: int, vocab_size: int) -> str:
    """Sample a continuation of `prompt` at temperature 0.8 with a fixed seed.

    Args:
        window: the model's sequence length; only the last `window` tokens are seen.
        vocab_size: real entries of the vocabulary.

    Returns:
        Prompt and continuation, decoded.
    """
    device = torch.cuda.current_device()
    generator = torch.Generator().manual_seed(SEED)
    ids = [tokenizer.eod_id, *map(int, tokenizer.encode(prompt))]
    for _ in range(tokens):
        context = torch.tensor([ids[-window:]], device=device)
        logits = model(context, torch.arange(context.size(1), device=device)[None], None)[0, -1, :vocab_size]
        probabilities = torch.softmax(logits.double().cpu() / TEMPERATURE, dim=-1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        if ids[-1] == tokenizer.eod_id:
            break
    return tokenizer.decode([i for i in ids if i != tokenizer.eod_id])
