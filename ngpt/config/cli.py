"""`ngpt config`: composes and checks a config, prints it and what it amounts to."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ngpt.config.compose import compose, to_yaml
from ngpt.config.errors import ConfigError
from ngpt.config.linears import describe_precision
from ngpt.config.megatron_arguments import unchecked_note
from ngpt.config.schema import Config
from ngpt.config.sizes import data_parallel_size, micro_batches_per_step, padded_vocab_size, tokens_per_step, world_size
from ngpt.estimate.counts import count_parameters, training_flops_per_token


def main(argv: Sequence[str], check: Callable[[Config], None] = lambda cfg: None) -> int:
    """Runs `ngpt config`.

    Args:
        argv: Its words.
        check: What is still to be checked of a composed config; raises `ConfigError`.

    Returns:
        The exit status: 2 for a config that breaks a rule, which goes to stderr.
    """
    parser = argparse.ArgumentParser(prog="ngpt config", description="Print the resolved config and its parameter, token and FLOP counts.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="experiment=NAME, GROUP=NAME or key=value")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], metavar="DIR", help="your own folder, laid out like conf/")
    arguments = parser.parse_intermixed_args(argv)
    try:
        cfg = compose(arguments.overrides, arguments.config_dir)
        check(cfg)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(to_yaml(cfg))
    for line in unchecked_note(cfg.megatron):
        print(f"# {line}")
    print(counts_table(cfg))
    return 0


def counts_table(cfg: Config) -> str:
    """Parameters, precision, tokens, FLOPs and batch layout of a resolved config, one a line, as YAML comments."""
    counts = count_parameters(cfg.model)
    tokens = tokens_per_step(cfg) * cfg.train.steps
    flops = training_flops_per_token(cfg.model, cfg.train.seq_length)
    active = f", {counts.active:,} active for a token" if counts.idle else ""
    kinds = {"attention": counts.attention, "MLP": counts.mlp, "Mamba": counts.mamba, "experts": counts.moe}
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
