"""The run header at the start of a run and summary.json at its end."""

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_ext.device import on_gpu
from megatron_ext.training.bridge import executor_of_experts, has_grouped_experts
from ngpt.analysis import metrics
from ngpt.checkpoints.choice import Choice
from ngpt.config import Config, ConfigError
from ngpt.config.checkpoints import start_checkpoint
from ngpt.config.experts import obstacles
from ngpt.config.linears import block_linears, describe_precision
from ngpt.config.megatron_arguments import unchecked_names, unchecked_note
from ngpt.config.sizes import data_parallel_size, micro_batches_per_step, tokens_per_step, wsd_decay_steps
from ngpt.data.entropy import ngram_bits_per_byte
from ngpt.data.indexed import IndexedReader
from ngpt.data.manifest import split_of
from ngpt.data.validation import evaluation_sequences, repeats
from ngpt.estimate.counts import count_parameters, training_flops_per_token
from ngpt.kernels.rows import MAX_WIDTH
from ngpt.progress import write_json
from ngpt.recipes import Recipe, joined_names
from ngpt.spikes import loss_spikes

MAX_COUNTED_TOKENS = 1 << 28  # of a validation split, for its entropies


def run_header(cfg: Config, backend: str, executors: dict[Recipe, str], args: argparse.Namespace) -> list[str]:
    """What this run is and which implementation was chosen for each operation, a line each."""
    parallel, counts = cfg.parallel, count_parameters(cfg.model)
    te = backend == "transformer_engine"
    device = torch.cuda.get_device_name() if on_gpu() else "CPU"
    optimizer = "DistributedOptimizer" if parallel.distributed_optimizer else "whole fp32 masters"
    fp32 = " (TF32 products)" if te and cfg.precision.dtype == "fp32" else ""
    return [
        f"{cfg.run.name}: {cfg.model.architecture}, {counts.total:,} parameters, "
        f"{training_flops_per_token(cfg.model, cfg.train.seq_length) / 1e9:.3g} GFLOP a token",
        f"  device {device} x {args.world_size}, precision {cfg.precision.name}{fp32}, backend {args.distributed_backend}",
        *precision_lines(cfg, backend, executors),
        *hybrid_lines(cfg, backend),
        f"  linears {'Transformer Engine' if te else 'Megatron local'}, attention {'Transformer Engine' if te else 'unfused'}, "
        f"{row_operations(cfg, backend)}",
        f"  tensor {parallel.tensor}{' + sequence' if parallel.sequence_parallel else ''}, pipeline {parallel.pipeline}"
        f"{f' x {parallel.virtual_pipeline} virtual' if parallel.virtual_pipeline else ''}, context {parallel.context}, "
        f"data {data_parallel_size(cfg)} ({optimizer}), recompute {parallel.recompute}",
        f"  {cfg.train.steps} steps of {cfg.train.global_batch_size} sequences x {cfg.train.seq_length} tokens = "
        f"{cfg.train.steps * tokens_per_step(cfg):,} tokens, {micro_batches_per_step(cfg)} micro-batches a step",
        *unchecked_note(cfg.megatron),
        *schedule_lines(cfg),
        *evaluation_lines(cfg),
        start_line(args, start_checkpoint(cfg)),
    ]


def schedule_lines(cfg: Config) -> list[str]:
    """A note where the run is too short for its schedule to decay: the first step of wsd's decay still has the full rate."""
    decay = wsd_decay_steps(cfg)
    if cfg.schedule.decay != "wsd" or decay > 1:
        return []
    left = f"schedule.decay_fraction={cfg.schedule.decay_fraction:g} leaves {decay} of {cfg.train.steps} steps to the decay"
    return [f"note: {left}: the rate does not fall"]


def evaluation_lines(cfg: Config) -> list[str]:
    """How much text is evaluated, with a note where it repeats; [] without evaluation."""
    sequences = evaluation_sequences(cfg)
    if not sequences:
        return []
    what = "the whole of data.valid, " if cfg.train.eval_whole_split else ""
    return [f"  evaluates {what}{sequences:,} sequences every {cfg.train.eval_interval} steps", *repeats(cfg)]


def start_line(args: argparse.Namespace, start: Choice | None) -> str:
    """What the first step starts from."""
    if start is None or not args.load:
        return "  starts from random weights"
    if args.finetune:
        return f"  starts at step 1 from the weights of {args.load}, step {start.step}; optimizer, schedule and data start anew"
    return f"  continues from {args.load}, step {start.step}"


def row_operations(cfg: Config, backend: str) -> str:
    """What runs the row-wise operations on activations: those of `ngpt.functional`, or the control's norm."""
    loss = f", cross entropy {'Triton kernels' if on_gpu() else 'eager torch'}"
    if cfg.model.architecture == "gpt":
        return f"RMSNorm {'Transformer Engine' if backend == 'transformer_engine' else 'eager torch'}{loss}"
    if not on_gpu():
        return f"normalisation, residual step and scales eager torch{loss}"
    widths = {cfg.model.hidden_size, *(width for linear in block_linears(cfg) for width in (linear.in_features, linear.out_features))}
    wide = ", ".join(f"{width:,}" for width in sorted(widths) if width > MAX_WIDTH)
    rows = "normalisation, residual step and scales Triton kernels" + (f", but eager torch for rows of {wide} features" if wide else "")
    return rows + loss


def precision_lines(cfg: Config, backend: str, executors: dict[Recipe, str]) -> list[str]:
    """What the linears of the blocks multiply, and what executes it; [] in plain fp32 or bf16."""
    if not executors:
        return []
    modules = "Transformer Engine's modules" if backend == "transformer_engine" else "Megatron's modules"
    lines = [f"  {line}" for line in describe_precision(cfg)]
    for recipe, executor in executors.items():
        quantised = "Triton kernels" if on_gpu() and recipe.quantised_by_kernels else "the torch reference"
        by = "Transformer Engine's kernels" if executor == "native" else f"emulated in {modules}, quantised by {quantised}"
        lines.append(f"  executor {executor}{f' of {recipe.name}' if len(executors) > 1 else ''}: {by}")
    return lines


def hybrid_lines(cfg: Config, backend: str) -> list[str]:
    """What runs the experts and the Mamba layers; [] where there are none."""
    parts = []
    if "E" in cfg.model.layer_pattern:
        parts.append(f"experts {_how_experts_run(cfg, backend)}, tokens by {cfg.parallel.token_dispatcher}")
    if "M" in cfg.model.layer_pattern:
        parts.append(f"Mamba scan and convolution {'mamba-ssm and causal-conv1d' if on_gpu() else 'plain torch'}")
    return [f"  {', '.join(parts)}"] if parts else []


def _how_experts_run(cfg: Config, backend: str) -> str:
    """Grouped, or one by one with the reason."""
    if has_grouped_experts(cfg, backend):
        return "grouped"
    asked = ["model.expert_impl=sequential"] if cfg.model.expert_impl == "sequential" else []
    reason = [*asked, *obstacles(cfg, executor_of_experts(cfg, backend))][0]
    return f"one by one ({reason})"


def byte_level_figures(cfg: Config, val_loss: float | None) -> dict[str, float]:
    """Validation loss in bits per byte, beside the unigram and bigram entropies of the same split; {} unless tokens are bytes.

    The entropies are those of the split's own counts, so they are what an n-gram model fitted on the split itself would reach. They are
    left out for splits of more than `MAX_COUNTED_TOKENS`, which take 8 bytes a token to count.
    """
    if cfg.tokenizer.kind != "bytes" or cfg.data.mock or len(cfg.data.valid) != 1:
        return {}
    prefix = cfg.data.valid[0].path
    manifest, name = split_of(prefix)
    split, figures = manifest.splits[name], {}
    if split.tokens <= MAX_COUNTED_TOKENS:
        tokens = IndexedReader(prefix).tokens
        figures = {f"{label}_bits_per_byte": ngram_bits_per_byte(tokens, order) for label, order in (("unigram", 1), ("bigram", 2))}
    if val_loss is not None:
        figures["val_bits_per_byte"] = val_loss / math.log(2) * split.tokens / split.bytes_of_text
    return figures


def _earlier(path: Path) -> dict[str, Any]:
    """The summary of the run's earlier part; {} where there is none, or a damaged one. A finished run must not fail because of it."""
    try:
        earlier = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    usable = isinstance(earlier, dict) and isinstance(earlier.get("wall_time_s"), int | float | None)
    return earlier if usable else {}


def _loss_spikes(path: Path) -> int | None:
    """How many spikes the training loss of the whole run has; None where its metrics cannot be read. A finished run must not fail."""
    try:
        records = metrics.read(path)
    except (ConfigError, OSError):
        return None
    return len(loss_spikes([metrics.number(record, "train_loss") for record in records if metrics.measured(record, "train_loss")]))


def write_summary(
    cfg: Config,
    backend: str,
    executors: dict[Recipe, str],
    last: dict[str, Any],
    status: str,
    wall_time_s: float,
    start_step: int,
) -> None:
    """Write summary.json.

    Args:
        executors: native | emulated, of each recipe in use.
        last: the newest value of every recorded figure.
        status: finished | stopped | failed.
        wall_time_s: of this process. The time of a resumed run's earlier part is added.
        start_step: the step this process continued from.
    """
    path = Path(cfg.run.dir) / "summary.json"
    step = int(last.get("step", start_step))
    if start_step and (earlier := _earlier(path)):
        wall_time_s += earlier.get("wall_time_s") or 0.0
        last = {name: earlier.get(name) for name in ("train_loss", "val_loss", "tokens_per_second", "worst_norm_deviation")} | last
    tokens = step * tokens_per_step(cfg)
    summary = {
        "run_name": cfg.run.name,
        "status": status,
        "architecture": cfg.model.architecture,
        "precision": joined_names(cfg.precision.name, cfg.precision.layers.values()),
        "executor": " and ".join(sorted(set(executors.values()))) or "none",
        "transformer_impl": backend,
        "parallel": {key: value for key, value in asdict(cfg.parallel).items() if key != "name"},
        "parameters": count_parameters(cfg.model).total,
        "steps": step,
        "tokens": tokens,
        "train_loss": last.get("train_loss"),
        "val_loss": last.get("val_loss"),
        "loss_spikes": _loss_spikes(Path(cfg.run.dir) / "metrics.jsonl"),
        "tokens_per_second": last.get("tokens_per_second"),
        "start_norm_deviation": last.get("start_norm_deviation"),
        "worst_norm_deviation": last.get("worst_norm_deviation"),
        "memory_gib": last.get("memory_gib"),
        "wall_time_s": round(wall_time_s, 1),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if names := unchecked_names(cfg.megatron):
        summary["unchecked_megatron_arguments"] = {name: cfg.megatron[name] for name in names}
    if status == "finished":
        summary |= byte_level_figures(cfg, last.get("val_loss"))
    write_json(path, summary, indent=2)
