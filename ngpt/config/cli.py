"""`ngpt config`: what a resolved config amounts to."""

import dataclasses
import json
import math
from typing import Any

from ngpt.config.compose import to_yaml
from ngpt.config.layers import LAYERS
from ngpt.config.linears import describe_precision
from ngpt.config.megatron_arguments import unchecked_note
from ngpt.config.schema import Config
from ngpt.config.sizes import data_parallel_size, micro_batches_per_step, padded_vocab_size, tokens_per_step, world_size
from ngpt.estimate.counts import count_parameters, training_flops_per_token


def as_text(cfg: Config) -> str:
    """The config as YAML, with notes and counts as comments."""
    return "\n".join([to_yaml(cfg), *(f"# {line}" for line in unchecked_note(cfg.megatron)), counts_table(cfg)])


def as_json(cfg: Config) -> str:
    """The same as one JSON object: config, notes and counts. JSON has no numbers for YAML's .inf and .nan: they are strings."""
    counts = count_parameters(cfg.model)
    values = {
        "config": _finite(dataclasses.asdict(cfg)),
        "notes": list(unchecked_note(cfg.megatron)),
        "counts": {
            "parameters_total": counts.total,
            "parameters_active": counts.active,
            "parameters_without_padding": counts.total_without_padding,
            "padded_vocab_size": padded_vocab_size(cfg.model),
            "precision": list(describe_precision(cfg)),
            "tokens": tokens_per_step(cfg) * cfg.train.steps,
            "tokens_per_step": tokens_per_step(cfg),
            "flops_per_token": training_flops_per_token(cfg.model, cfg.train.seq_length),
            "processes": world_size(cfg),
            "data_parallel": data_parallel_size(cfg),
            "micro_batches_per_step": micro_batches_per_step(cfg),
        },
    }
    return json.dumps(values, indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def counts_table(cfg: Config) -> str:
    """Parameters, precision, tokens, FLOPs and batch layout of a resolved config, one a line, as YAML comments."""
    counts = count_parameters(cfg.model)
    tokens = tokens_per_step(cfg) * cfg.train.steps
    flops = training_flops_per_token(cfg.model, cfg.train.seq_length)
    active = f", {counts.active:,} active for a token" if counts.idle else ""
    kinds = {LAYERS[symbol].title: count for symbol, count in counts.layers.items()}
    rows = {
        "parameters": f"{counts.total:,} (without vocabulary padding {counts.total_without_padding:,})" + active,
        "  blocks": f"{counts.blocks:,} ({', '.join(f'{name} {count:,}' for name, count in kinds.items() if count)})",
        "  embedding and head": f"{counts.embedding + counts.head:,}",
        "  other": f"{counts.logit_scale + counts.final_norm:,} (logit scale, final norm)",
        "vocabulary": f"{cfg.model.vocab_size:,} padded to {padded_vocab_size(cfg.model):,}",
        "precision": "; ".join(describe_precision(cfg)),
        "tokens": f"{tokens:,} ({tokens_per_step(cfg):,} a step, {cfg.train.steps:,} steps)",
        "training FLOPs": f"{flops / 1e9:.4g} GFLOP a token, {flops * tokens:.4g} FLOP in all",
        "processes": f"{world_size(cfg)}, data parallel {data_parallel_size(cfg)}",
        "micro-batches a step": f"{micro_batches_per_step(cfg)} of {cfg.train.micro_batch_size} sequences on each data-parallel rank",
    }
    width = max(map(len, rows))
    return "\n".join(f"# {name:<{width}}  {value}" for name, value in rows.items())
