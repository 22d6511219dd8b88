"""What makes two configs the same model, and how two configs differ."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ngpt.config.layers import LAYERS
from ngpt.config.megatron_arguments import unchecked_names
from ngpt.config.pattern import without_cuts
from ngpt.config.schema import EXECUTION_FIELDS, LEARNING_FIELDS, NGPT_FIELDS, Config

# Beyond `model.*`: the lengths and the tokens that the weights have learnt. Precision is left out: a model can be continued in another.
DEFINING_KEYS = ("train.seq_length", "tokenizer.kind", "tokenizer.vocab_size")
# Symbol of the layer pattern: prefixes of the keys that mean nothing without it.
_KEYS_OF = {symbol: kind.keys for symbol, kind in LAYERS.items() if kind.keys} | {"/": "model.mtp_"}
NOT_SET = "(not set)"

Changes = dict[str, tuple[Any, Any]]  # dotted key: (old, new)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A config, section or nested mapping as {dotted key: value}. Lists stay whole."""
    values = tree if isinstance(tree, Mapping) else dataclasses.asdict(tree)
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def model_defining(cfg: Config) -> dict[str, Any]:
    """The values of a resolved config that may not change when a run resumes: they define the function that is trained."""
    flat = flatten(cfg)
    execution = {f"model.{name}" for name in EXECUTION_FIELDS}
    defining = {key: value for key, value in flat.items() if key.startswith("model.") and key not in execution}
    absent = tuple(prefix for symbol, prefix in _KEYS_OF.items() if symbol not in defining["model.layer_pattern"])
    defining = {key: value for key, value in defining.items() if not key.startswith(absent)}
    # Pipeline cuts say where a layer runs, not what it computes.
    defining["model.layer_pattern"] = without_cuts(defining["model.layer_pattern"])
    unchecked = {f"megatron.{name}": cfg.megatron[name] for name in unchecked_names(cfg.megatron)}
    return defining | {key: flat[key] for key in DEFINING_KEYS} | unchecked


def function_defining(cfg: Config) -> dict[str, Any]:
    """The values of `model` in a resolved config that the weights depend on: with others they compute another function."""
    unread = LEARNING_FIELDS | (NGPT_FIELDS if cfg.model.architecture == "gpt" else frozenset())
    if cfg.model.position_embedding == "none":
        unread |= {"rope_base"}
    values = model_defining(cfg)
    return {key: value for key, value in values.items() if key.startswith("model.") and key.removeprefix("model.") not in unread}


def diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> Changes:
    """The keys whose values differ: {dotted key: (value in a, value in b)}; a key that one lacks counts as `NOT_SET` there."""
    first, second = flatten(a), flatten(b)
    pairs = {key: (first.get(key, NOT_SET), second.get(key, NOT_SET)) for key in sorted(first.keys() | second.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def listed(changes: Changes) -> str:
    """Changed keys in words."""
    return "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())
