"""Checks of single values: ranges and choices. Nothing here looks at two keys at once."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config, WandbConfig

_POSITIVE = """
    model.num_layers model.hidden_size model.ffn_hidden_size model.num_attention_heads model.num_query_groups model.head_dim
    model.moe_top_k model.moe_ffn_hidden_size model.moe_scaling model.mtp_loss_coeff
    model.mamba_head_dim model.mamba_state_dim model.mamba_num_groups model.mamba_chunk_size
    model.rope_base model.vocab_size model.vocab_padding_multiple model.init_std model.norm_epsilon model.alpha_init model.sz_init
    optim.lr optim.eps tokenizer.vocab_size
    parallel.tensor parallel.pipeline parallel.virtual_pipeline parallel.expert parallel.expert_tensor parallel.context
    parallel.recompute_num_layers cluster.nodes cluster.gpus_per_node cluster.cpus_per_task cluster.save_time_s cluster.hang_timeout_s
    logging.interval logging.health_interval checkpoint.interval checkpoint.keep_last checkpoint.keep_every
    train.micro_batch_size train.global_batch_size train.steps train.seq_length train.eval_sequences
    train.eval_interval train.eval_tasks_interval train.eval_tasks_limit train.spike_threshold train.max_rollbacks train.stop_after
    debug.norm_tolerance debug.profile_start
""".split()
_NOT_NEGATIVE = """
    optim.min_lr optim.weight_decay optim.clip_grad schedule.warmup_steps data.num_workers train.eval_steps
    precision.num_layers_at_start_in_bf16 precision.num_layers_at_end_in_bf16
    cluster.save_margin_s cluster.max_restarts
    model.num_experts model.moe_shared_ffn_hidden_size model.moe_expert_bias_rate model.moe_aux_loss_coeff model.mamba_num_heads
""".split()
_FRACTIONS = {  # key: (does the range hold this value, the range in words)
    "optim.beta1": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "optim.beta2": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "schedule.decay_fraction": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "precision.bf16_tail": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "logging.straggler_ratio": (lambda value: value is None or value > 1, "above 1"),
    "train.seed": (lambda value: 0 < value < 2**31, "from 1 to 2147483647"),  # Megatron adds ranks to it
    "train.eval_seed": (lambda value: 0 <= value < 2**31, "from 0 to 2147483647"),
    "cluster.rendezvous_port": (lambda value: value is None or 0 < value < 65536, "a port, 1 to 65535"),
}
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # numbers that float32 holds with all its digits
_SPANS = {  # key: (least value, largest value, why)
    "optim.lr": (_SMALLEST, 2.0**24, "Adam moves a weight by up to it in a step: beyond 2^24, float32 keeps nothing of a weight of 1"),
    "model.init_std": (1e-4, 1e15, "Squares of such weights vanish beside the 1e-12 that normalisation adds, or overflow float32"),
    "model.alpha_init": (1e-15, 1e15, "Squares of such steps leave the range of float32"),
    "cluster.hang_timeout_s": (1e-3, 1e9, "Timers take a millisecond to 30 years"),
}


def _choices(section: type = Config, prefix: str = "") -> Iterator[tuple[str, Mapping[Any, str]]]:
    for entry in dataclasses.fields(section):
        if isinstance(entry.type, type) and dataclasses.is_dataclass(entry.type):
            yield from _choices(entry.type, f"{prefix}{entry.name}.")
        elif "choices" in entry.metadata:
            yield prefix + entry.name, entry.metadata["choices"]


def _chosen(section: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[Any, str], Any]]:
    """(dotted key, its values, the one chosen) of every choice of a config, in the entries of its mappings and lists, too."""
    for entry in dataclasses.fields(section):
        value, key = getattr(section, entry.name), prefix + entry.name
        if "choices" in entry.metadata:
            yield key, entry.metadata["choices"], value
        parts = {key: value}
        if isinstance(value, dict):
            parts = {f"{key}.{name}": part for name, part in value.items()}
        elif isinstance(value, list):
            parts = {f"{key}[{index}]": part for index, part in enumerate(value)}
        for path, part in parts.items():
            if dataclasses.is_dataclass(part):
                yield from _chosen(part, f"{path}.")


CHOICES = dict(_choices())  # dotted key: its values, or those in its list, each with one line on it
_UNTESTED = "the retraction of the weights after its step is not built and tested yet"
_REFUSED = {  # values that exist elsewhere, with the reason why not here
    "optim.optimizer": {
        "adamw": "Megatron's adam decouples weight decay already, it is AdamW",
        **dict.fromkeys(("sgd", "lion", "muon", "dist_muon", "adaptive_muon", "soap", "shampoo"), _UNTESTED),
    },
    "precision.dtype": {
        "fp16": "needs loss scaling, and a skipped step is untested with the retraction",
        **dict.fromkeys(("fp8", "mxfp8", "nvfp4", "fp4"), "weights stay in fp32 or bf16, and precision.format quantises their products"),
    },
    "parallel.token_dispatcher": {"flex": "its kernels (DeepEP and the like) are not built and tested here"},
    "model.position_embedding": {"learned_absolute": "a learned position table is no part of either model"},
}


def check_ranges(cfg: Config) -> Iterator[ConfigError]:
    """Yields an error for each number outside its range."""
    for key in _POSITIVE:
        value = _get(cfg, key)
        if value is not None and not value > 0:
            yield ConfigError(key, value, "Must be positive", f"Set {key} {'to 1 or more' if isinstance(value, int) else 'above 0'}")
    for key in _NOT_NEGATIVE:
        value = _get(cfg, key)
        if not value >= 0:
            yield ConfigError(key, value, "Must not be negative", f"Set {key}=0 or more")
    for key, (holds, words) in _FRACTIONS.items():
        value = _get(cfg, key)
        if not holds(value):
            yield ConfigError(key, value, f"Must be {words}", f"Correct {key}")
    yield from _check_magnitudes(cfg)
    if cfg.run.dir == "":
        yield ConfigError(
            "run.dir", "''", "Names the run folder", "Set run.dir=FOLDER, or leave it out: it follows from run.root and run.name"
        )
    yield from _check_wandb(cfg.logging.wandb)
    if not re.fullmatch(r"[\w.+=,@-]*\w[\w.+=,@-]*", cfg.run.name):
        yield ConfigError("run.name", repr(cfg.run.name), "Names a folder: letters, digits and _ . + = , @ -", "Set run.name=NAME")
    for split in ("train", "valid"):
        for index, source in enumerate(getattr(cfg.data, split)):
            if not (source.weight > 0 and math.isfinite(source.weight)):
                key = f"data.{split}[{index}].weight"
                yield ConfigError(key, source.weight, "Must be positive", "Set a weight above 0 or drop the source")


def _check_magnitudes(cfg: Config) -> Iterator[ConfigError]:
    """Numbers that computing in float32 would turn into 0 or infinity."""
    for key, value in _floats(cfg):
        if math.isinf(value):
            yield ConfigError(key, value, "Must be finite", f"Set a smaller {key}")
        elif key in _SPANS and value > 0:
            least, most, why = _SPANS[key]
            if not least <= value <= most:
                yield ConfigError(key, value, why, f"Set {key} between {least:.3g} and {most:.3g}")
        elif key.startswith(("model.", "optim.")) and (0 < abs(value) < _SMALLEST or abs(value) > _LARGEST):
            rule = f"Is {'0' if abs(value) < 1 else 'infinite'} in float32"
            yield ConfigError(key, value, rule, f"Set {key} between {_SMALLEST:.3g} and {_LARGEST:.3g}")


def _floats(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    for entry in dataclasses.fields(section):
        value, key = getattr(section, entry.name), prefix + entry.name
        if dataclasses.is_dataclass(value):
            yield from _floats(value, f"{key}.")
        elif isinstance(value, float):
            yield key, value


def check_choices(cfg: Config) -> Iterator[ConfigError]:
    """Yields an error for each name that is not one of the supported ones, with the reason where one is known."""
    yield from choice_errors(cfg)
    *modules, last = CHOICES["parallel.recompute_modules"]
    for module in cfg.parallel.recompute_modules:
        if module not in (*modules, last):
            rule = f"Selective recompute knows {', '.join(modules)} and {last}"
            yield ConfigError("parallel.recompute_modules", module, rule, "Set parallel.recompute_modules=[core_attn]")


def choice_errors(section: Any) -> Iterator[ConfigError]:
    """The same for any tree of dataclasses."""
    for key, choices, value in _chosen(section):
        if isinstance(value, list) or value in choices:
            continue
        listed = ", ".join(str(choice) for choice in choices if choice is not None)
        reason = _REFUSED.get(key, {}).get(value)
        rule = f"{value} is not supported: {reason}" if reason else f"Must be one of {listed}"
        yield ConfigError(key, value, rule, f"Set {key} to {listed.replace(', ', ' or ')}")


def _check_wandb(options: WandbConfig) -> Iterator[ConfigError]:
    """What the client would refuse only once the run has started."""
    if not re.fullmatch(r"[^/\\#?%:]{1,128}", options.project):
        rule = "Names a project of W&B: 1 to 128 characters, none of / \\ # ? % :"
        yield ConfigError("logging.wandb.project", repr(options.project), rule, "Set logging.wandb.project=NAME")
    for name in ("entity", "group"):
        if getattr(options, name) == "":
            yield ConfigError(f"logging.wandb.{name}", "''", "Is a name or null", f"Set logging.wandb.{name}=NAME, or leave it out")
    for tag in options.tags:
        if not 1 <= len(tag) <= 64:
            yield ConfigError("logging.wandb.tags", repr(tag), "Each has 1 to 64 characters", "Shorten it, or leave it out")


def _get(cfg: Config, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = cfg
    for name in key.split("."):
        value = getattr(value, name)
    return value


Check = Callable[[Config], Iterator[ConfigError]]
CHECKS: tuple[Check, ...] = (check_ranges, check_choices)
