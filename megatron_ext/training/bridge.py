"""The one bridge from our config to Megatron: its arguments, its dataclass container and our model config.

Megatron's loop reads both an argparse namespace and a container of dataclasses. Both are made here, through Megatron's own parser and
validation, from the resolved `Config`; nothing reads sys.argv.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import global_vars
from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args
from megatron.training.config import PretrainConfigContainer
from megatron.training.global_vars import set_global_variables

from megatron_ext.device import on_gpu
from megatron_ext.models.builder import PluginModelConfig
from megatron_ext.precision.policy import choose_executors
from megatron_ext.training.watchdog import SLOW_FACTOR
from ngpt.config import Config, ConfigError
from ngpt.config.activations import ACTIVATIONS, FUSIONS
from ngpt.config.checkpoints import is_own, start_checkpoint
from ngpt.config.executor import expected_executor
from ngpt.config.experts import ExecutorOf, groups_experts
from ngpt.config.megatron_arguments import passed_on
from ngpt.config.pattern import cut_pattern, parse
from ngpt.config.sizes import padded_vocab_size, pipeline_stages, wsd_decay_steps
from ngpt.data.validation import evaluation_batches
from ngpt.kernels.activation.functions import TORCH


def _model(cfg: Config, backend: str) -> dict[str, Any]:
    model, local = cfg.model, backend == "local"
    return dict(
        transformer_impl=backend,
        hybrid_layer_pattern=cut_pattern(model.layer_pattern, pipeline_stages(cfg)),
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=True,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        **ACTIVATIONS[model.activation].megatron,
        untie_embeddings_and_output_weights=not model.tied_embeddings,
        position_embedding_type=model.position_embedding,
        rotary_base=model.rope_base,
        max_position_embeddings=cfg.train.seq_length,
        seq_length=cfg.train.seq_length,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        init_method_std=model.init_std,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=cfg.precision.dtype == "bf16",
        tokenizer_type="NullTokenizer",
        vocab_size=model.vocab_size,
        padded_vocab_size=padded_vocab_size(model),
        pad_vocab_size=False,
        # The local path's fused kernels need apex.
        no_persist_layer_norm=local,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **dict.fromkeys(FUSIONS, not local),
        bias_gelu_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        attention_softmax_in_fp32=local,
    )


def _experts(cfg: Config, backend: str) -> dict[str, Any]:
    model, parallel = cfg.model, cfg.parallel
    if "E" not in model.layer_pattern:
        return {}
    single_softmax = model.moe_score == "softmax" and model.moe_top_k == 1  # over all experts, since there is no selection to divide by
    return dict(
        num_experts=model.num_experts,
        moe_router_topk=model.moe_top_k,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.moe_shared_ffn_hidden_size or None,
        moe_router_score_function=model.moe_score,
        moe_router_pre_softmax=single_softmax,
        moe_router_topk_scaling_factor=model.moe_scaling,
        moe_router_enable_expert_bias=model.moe_expert_bias,
        moe_router_bias_update_rate=model.moe_expert_bias_rate,
        moe_router_load_balancing_type=[model.moe_aux_loss],
        moe_aux_loss_coeff=[model.moe_aux_loss_coeff],
        moe_router_dtype="fp32",
        moe_token_dispatcher_type=parallel.token_dispatcher,
        moe_shared_expert_overlap=parallel.shared_expert_overlap,
    )


def has_grouped_experts(cfg: Config, backend: str) -> bool:
    """Whether all experts of a rank run together on this device.

    Raises:
        ConfigError: that was asked for by name and cannot be here.
    """
    return groups_experts(cfg, executor_of_experts(cfg, backend))


def executor_of_experts(cfg: Config, backend: str) -> ExecutorOf:
    """What runs a recipe on this device. Even one that no linear has, because all blocks with experts stay in bf16."""
    executors = choose_executors(cfg, backend)
    return lambda recipe: executors.get(recipe) or expected_executor(cfg, recipe)


def _mamba(cfg: Config) -> dict[str, Any]:
    model = cfg.model
    if "M" not in model.layer_pattern:
        return {}
    return dict(
        mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim,
        mamba_state_dim=model.mamba_state_dim,
        mamba_num_groups=model.mamba_num_groups,
    )


def _prediction(cfg: Config) -> dict[str, Any]:
    """Megatron reads the number of depths and their layers off the layer pattern."""
    return dict(mtp_loss_scaling_factor=cfg.model.mtp_loss_coeff) if parse(cfg.model.layer_pattern).depths else {}


def _training(cfg: Config) -> dict[str, Any]:
    train, optim, schedule = cfg.train, cfg.optim, cfg.schedule
    return dict(
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        train_iters=train.steps,
        seed=train.seed,
        eval_interval=train.eval_interval,
        eval_iters=evaluation_batches(cfg),
        exit_interval=train.stop_after,
        optimizer=optim.optimizer,
        lr=optim.lr,
        min_lr=optim.min_lr,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_grad=optim.clip_grad,
        lr_decay_style="WSD" if schedule.decay == "wsd" else schedule.decay,
        lr_decay_iters=train.steps,
        lr_warmup_iters=schedule.warmup_steps,
        lr_wsd_decay_style=schedule.wsd_decay,
        lr_wsd_decay_iters=wsd_decay_steps(cfg) if schedule.decay == "wsd" else None,
        accumulate_allreduce_grads_in_fp32=cfg.precision.grad_reduce_in_fp32,
        deterministic_mode=cfg.debug.deterministic,
        calculate_per_token_loss=True,  # the loss is a mean over the step's tokens, also where a mask makes micro-batches unequal
        rerun_mode="disabled",
        check_for_nan_in_loss_and_grad=False,  # costs a pass over every bucket; the norm for clipping shows the same
        dataloader_type="external",
        num_workers=cfg.data.num_workers,
        data_cache_path=cfg.data.cache_dir,
        enable_one_logger=False,
    )


def _parallel(cfg: Config) -> dict[str, Any]:
    parallel = cfg.parallel
    selective = parallel.recompute == "selective"
    return dict(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.sequence_parallel,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        recompute_granularity=None if parallel.recompute == "none" else parallel.recompute,
        recompute_modules=(parallel.recompute_modules or ["core_attn"]) if selective else None,
        recompute_method=parallel.recompute_method if parallel.recompute == "full" else None,
        recompute_num_layers=parallel.recompute_num_layers if parallel.recompute == "full" else None,
        distributed_backend="nccl" if on_gpu() else "gloo",
        **_collective_timeout(cfg),
    )


def _collective_timeout(cfg: Config) -> dict[str, Any]:
    """Collectives wait longer than the watchdog: it can say which rank they wait for."""
    if cfg.cluster.hang_timeout_s is None:
        return {}
    longest = SLOW_FACTOR * cfg.cluster.hang_timeout_s
    return dict(distributed_timeout_minutes=math.ceil(longest / 60) + 5)


def _files(cfg: Config) -> dict[str, Any]:
    """Logging and checkpoints. Only the fully reshardable distributed format is ever written (launch/OPERATIONS.md "Checkpoints")."""
    checkpoint, run_dir = cfg.checkpoint, Path(cfg.run.dir)
    saves = checkpoint.save_at_end or checkpoint.interval is not None
    start = start_checkpoint(cfg)
    source = None if start is None else str(start.folder.parent)
    resuming = start is not None and is_own(cfg, start)
    fresh_start = source is not None and not resuming and not checkpoint.load_optimizer
    return dict(
        log_interval=cfg.logging.interval,
        tensorboard_dir=str(run_dir / "tensorboard"),
        tensorboard_log_interval=1,  # the recorder picks the steps
        log_timers_to_tensorboard=True,
        log_loss_scale_to_tensorboard=False,
        profile=cfg.debug.profile,
        use_pytorch_profiler=cfg.debug.profile,
        profile_step_start=cfg.debug.profile_start,
        profile_step_end=cfg.debug.profile_stop,
        profile_ranks=cfg.debug.profile_ranks,
        save=checkpoint.dir if saves else None,
        save_interval=(checkpoint.interval or cfg.train.steps) if saves else None,
        load=source,
        exit_on_missing_checkpoint=source is not None,
        finetune=fresh_start,
        no_load_optim=True if fresh_start else None,
        no_load_rng=True if fresh_start else None,
        ckpt_format="torch_dist",
        dist_ckpt_optim_fully_reshardable=True,
        async_save=checkpoint.async_save,
        async_strategy="mcore" if checkpoint.async_save else None,
        use_persistent_ckpt_worker=checkpoint.async_save,
    )


def megatron_arguments(cfg: Config, backend: str) -> dict[str, Any]:
    """Every Megatron argument this config sets, by argparse name, the pass-through group `megatron` last."""
    ours = _model(cfg, backend) | _experts(cfg, backend) | _mamba(cfg) | _prediction(cfg) | _training(cfg) | _parallel(cfg) | _files(cfg)
    return ours | passed_on(cfg.megatron)


def _check_value(name: str, value: Any, action: argparse.Action) -> None:
    """Megatron's parser would print its whole usage instead.

    Raises:
        ConfigError: a value that the argument does not take.
    """
    for item in value if isinstance(value, list | tuple) else [value]:
        try:
            parsed = action.type(str(item)) if action.type else str(item)
        except (argparse.ArgumentTypeError, TypeError, ValueError):
            rule = f"Megatron reads it as {getattr(action.type, '__name__', action.type)}"
            raise ConfigError(f"megatron.{name}", value, rule, "Correct it, or leave it out") from None
        if action.choices is not None and parsed not in action.choices:
            rule = f"Must be one of {', '.join(map(str, action.choices))}"
            raise ConfigError(f"megatron.{name}", value, rule, "Choose one of them, or leave it out")


def to_argv(values: dict[str, Any]) -> list[str]:
    """Command line that makes Megatron's own parser produce `values`.

    Raises:
        ConfigError: a name Megatron does not have, or a value its flag cannot express.
    """
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, []).append(action)
    argv = []
    for name, value in values.items():
        if name not in actions:
            raise ConfigError(
                f"megatron.{name}",
                value,
                "megatron-core 0.19.2 has no such argument",
                "Use the argparse name, with underscores, of an argument of megatron/training/arguments.py",
            )
        first = actions[name][0]
        if first.nargs == 0:
            if value is None or value == first.default:
                continue
            flag = next((a for a in actions[name] if a.const == value), None)
            if flag is None:
                raise ConfigError(f"megatron.{name}", value, f"A flag that can only be {first.const}", f"Remove it or set {first.const}")
            argv.append(flag.option_strings[0])
            continue
        if value is not None:
            _check_value(name, value, first)
        if isinstance(value, list | tuple):
            argv += [first.option_strings[0], *map(str, value)] if value else []
        elif value is not None:
            argv.append(f"{first.option_strings[0]}={value}")
    return argv


class ScalarTap:
    """Takes the place of the TensorBoard writer of Megatron's loop, on the last rank. Scalars go to whoever puts a function here."""

    def add_scalar(self, *_: Any, **__: Any) -> None:
        """Replaced by the metrics of a training run; elsewhere scalars are dropped."""

    def add_text(self, *_: Any, **__: Any) -> None:
        """Megatron writes each of its 821 arguments; our resolved config is written by the metrics."""

    def flush(self) -> None:
        """Nothing is buffered."""


def _set_globals(args: argparse.Namespace) -> None:
    """Megatron's globals, with a tap for its scalars in place of its own writer. The folder's name stays: profiles go beside it."""
    folder, args.tensorboard_dir = args.tensorboard_dir, None
    set_global_variables(args, build_tokenizer=False)  # no one asks for it, and its module imports transformers
    args.tensorboard_dir = folder
    if folder and args.rank == args.world_size - 1:
        global_vars._GLOBAL_TENSORBOARD_WRITER = ScalarTap()


def choose_activation(config: TransformerConfig, name: str) -> None:
    """Gives Megatron's config what the MLPs of the control compute, where no argument of Megatron's chooses it."""
    activation = ACTIVATIONS[name]
    if not activation.megatron:
        if activation.function not in TORCH:
            raise KeyError(f"{activation.function}: the control needs torch's own, in TORCH of ngpt/kernels/activation/functions.py")
        config.activation_func, config.gated_linear_unit = TORCH[activation.function], activation.gated


def setup_megatron(cfg: Config, backend: str, **overrides: Any) -> tuple[argparse.Namespace, PretrainConfigContainer]:
    """Validated arguments in Megatron's globals, and the container for `pretrain`.

    Args:
        backend: `local` or `transformer_engine`.
        overrides: Megatron arguments that win over the config's (the comparison of an export uses them).
    """
    argv = to_argv(megatron_arguments(cfg, backend) | overrides)
    command_line, sys.argv = sys.argv, ["ngpt", *argv]  # parse_args takes arguments no other way
    try:
        args = parse_args()
    finally:
        sys.argv = command_line
    validate_args(args, {})
    _set_globals(args)
    model = hybrid_config_from_args(args)
    choose_activation(model.transformer, cfg.model.activation)
    plugin = PluginModelConfig(
        **{item.name: getattr(model, item.name) for item in dataclasses.fields(model)},
        options=cfg.model,
        grouped_experts="E" in cfg.model.layer_pattern and has_grouped_experts(cfg, backend),
    )
    return args, pretrain_cfg_container_from_args(args, plugin)
