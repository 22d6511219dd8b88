"""The pass-through group `megatron`: which of Megatron's own arguments a config may set, and what values they take.

Allowed are those known not to change the function that is trained (tests/distributed trains with those that work on a CPU).
`megatron.unchecked=true` lets any other through that is neither owned nor refused (ngpt/config/megatron_keys.py); the run's header and
summary then say so.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.config.megatron_keys import OWNED, REFUSED, REFUSED_LATER
from ngpt.config.schema import Config

UNCHECKED = "unchecked"
EVENLY = "moe_router_force_load_balancing"


@dataclass(frozen=True)
class Kind:
    """What an argument takes: in words, and whether a value is one."""

    words: str
    holds: Callable[[Any], bool]
    is_list: bool = False


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(*choices: str | int) -> Kind:
    return Kind(f"one of {', '.join(map(str, choices))}", lambda value: not isinstance(value, bool) and value in choices)


def _list_of(kind: Kind) -> Kind:
    return Kind(f"a list, each of it {kind.words}", lambda value: isinstance(value, list) and all(map(kind.holds, value)), is_list=True)


_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_COUNT = Kind("a whole number of 1 or more", lambda value: _whole(value) and value >= 1)
_COUNT_OR_ZERO = Kind("a whole number of 0 or more", lambda value: _whole(value) and value >= 0)
_TEXT = Kind("one word or path", lambda value: isinstance(value, str) or _number(value))

ALLOWED = {
    # What is logged, measured and profiled.
    **dict.fromkeys(
        """
        log_params_norm log_throughput log_progress log_validation_ppl_to_tensorboard log_memory_to_tensorboard log_device_memory_used
        log_num_zeros_in_grad log_max_attention_logit log_world_size_to_tensorboard log_energy barrier_with_L1_time moe_per_layer_logging
        pytorch_profiler_collect_shapes pytorch_profiler_collect_callstack record_shapes nvtx_ranges record_memory_history
        """.split(),
        _FLAG,
    ),
    "log_memory_interval": _COUNT,
    "timing_log_level": _one_of(0, 1, 2),
    "timing_log_option": _one_of("max", "minmax", "all"),
    "logging_level": _COUNT_OR_ZERO,
    "memory_snapshot_path": _TEXT,
    # The host, memory and communication of a rank.
    "manual_gc": _FLAG,
    "manual_gc_interval": _COUNT_OR_ZERO,
    "manual_gc_eval": _FLAG,
    "empty_unused_memory_level": _one_of(0, 1, 2),
    "train_sync_interval": _COUNT,
    "num_dataset_builder_threads": _COUNT,
    "ddp_bucket_size": _COUNT,
    "ddp_num_buckets": _COUNT,
    "ddp_pad_buckets_for_high_nccl_busbw": _FLAG,
    "align_grad_reduce": _FLAG,
    "align_param_gather": _FLAG,
    "distributed_timeout_minutes": _COUNT,
    "nccl_communicator_config_path": _TEXT,
    "high_priority_stream_groups": _list_of(_TEXT),
    "tp_comm_overlap": _FLAG,
    # Which of a layer's kernels runs, and how it is launched.
    "attention_backend": _one_of("flash", "fused", "unfused", "local", "auto"),
    "moe_permute_fusion": _FLAG,
    "te_rng_tracker": _FLAG,
    "cuda_graph_impl": _one_of("none", "local", "transformer_engine", "full_iteration"),
    "cuda_graph_modules": _list_of(_one_of("attn", "mlp", "moe", "moe_router", "moe_preprocess", "mamba")),
    "cuda_graph_warmup_steps": _COUNT_OR_ZERO,
    "enable_cuda_graph": _FLAG,
    "external_cuda_graph": _FLAG,
    # Set by this project, and free to be set otherwise.
    "attention_softmax_in_fp32": _FLAG,
    "check_for_nan_in_loss_and_grad": _FLAG,
    # Not the model: which batches a resumed run skips, and whose schedule it follows.
    "iterations_to_skip": _list_of(_COUNT),
    "override_opt_param_scheduler": _FLAG,
    # For measurements: tokens go to experts evenly, whatever the router says. The header says so.
    EVENLY: _FLAG,
}
_NOT_ALLOWED = "Is not among the arguments that are known not to change the function that is trained"
# Known reasons why some are not allowed.
_OTHERWISE = {
    "window_size": "Replaces the mask that keeps documents apart and split sequences in order, and estimate and FLOPs know no window",
    "window_attn_skip_freq": "Says which layers have a window, and none has",
}


def passed_on(megatron: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the group that goes to Megatron."""
    return {name: value for name, value in megatron.items() if name != UNCHECKED}


def unchecked_names(megatron: Mapping[str, Any]) -> list[str]:
    """Arguments that nobody has checked: they may change the function that is trained."""
    return sorted(str(name) for name in passed_on(megatron) if name not in ALLOWED)


def of_earlier_run(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's config says about the group, as this version reads it.

    A run from before arguments were checked may have some that are not allowed now, or values that Megatron reads and the list does not.
    They count as unchecked. Arguments refused since then that only chose how something is computed are left out.
    """
    kept = {name: value for name, value in recorded.items() if name not in REFUSED_LATER}
    for name, kind in ALLOWED.items():
        if kind.is_list and isinstance(kept.get(name), str | int):
            kept[name] = [kept[name]]
    unknown = [name for name in unchecked_names(kept) if name not in OWNED and name not in REFUSED]
    odd = [name for name, kind in ALLOWED.items() if kept.get(name) is not None and not kind.holds(kept[name])]
    return kept | ({UNCHECKED: True} if unknown or odd else {})


def unchecked_note(megatron: Mapping[str, Any]) -> list[str]:
    """Lines for a run's header where such arguments are set; [] where none is."""
    names = unchecked_names(megatron)
    words = ", ".join(f"{name}={megatron[name]}" for name in names)
    notes = [f"note: unchecked Megatron arguments ({words}): they may train another function than this config says"] if names else []
    return notes + ([f"note: megatron.{EVENLY}: the router's choice is not used, for measurements only"] if megatron.get(EVENLY) else [])


def check_megatron(cfg: Config) -> Iterator[ConfigError]:
    """The group holds allowed arguments with values they take, and others only where the config says that they are unchecked."""
    lets_through = cfg.megatron.get(UNCHECKED, False)
    if not isinstance(lets_through, bool):
        yield ConfigError(f"megatron.{UNCHECKED}", lets_through, "Must be true or false", "Correct it")
    for name, value in passed_on(cfg.megatron).items():
        path, argument = f"megatron.{name}", name.lstrip("-").replace("-", "_")
        if argument in OWNED:
            yield ConfigError(path, value, f"{OWNED[argument]} sets this argument", f"Set {OWNED[argument]} instead")
        elif argument in REFUSED:
            yield ConfigError(path, value, f"Refused: {REFUSED[argument]}", "Remove it")
        elif name in ALLOWED:
            if value is not None and lets_through is not True and not ALLOWED[name].holds(value):
                yield ConfigError(path, value, f"Takes {ALLOWED[name].words}", "Correct it, or leave it out")
        elif lets_through is not True:
            near = difflib.get_close_matches(argument, [*ALLOWED, *OWNED], n=1, cutoff=0.8)
            meant = "".join(f"Did you mean {OWNED.get(word, f'megatron.{word}')}? " for word in near)
            rule = _OTHERWISE.get(argument, _NOT_ALLOWED)
            yield ConfigError(path, value, rule, f"{meant}Remove it; megatron.{UNCHECKED}=true passes it on and marks the run")
