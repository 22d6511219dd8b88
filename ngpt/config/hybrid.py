"""The rules of Mamba-2 and mixture-of-experts layers and of prediction depths: their sizes and options, also when split over ranks."""

import math
from collections.abc import Iterator

from ngpt.config.errors import ConfigError
from ngpt.config.layers import layer_with
from ngpt.config.pattern import cut_pattern, parse
from ngpt.config.schema import Config
from ngpt.config.sizes import expert_tensor_size, model_parallel_size, pipeline_stages, round_up, world_size


def check_experts(cfg: Config) -> Iterator[ConfigError]:
    """An E layer has experts, its router can choose among them, and they divide over the ranks."""
    model, parallel = cfg.model, cfg.parallel
    if "E" not in model.layer_pattern:
        return
    if not model.num_experts:
        rule = f"model.layer_pattern {model.layer_pattern!r} has E layers"
        yield ConfigError("model.num_experts", 0, rule, "Set model.num_experts, or take E out of the pattern")
        return
    if model.moe_top_k > model.num_experts:
        rule = f"Must not exceed model.num_experts {model.num_experts}"
        yield ConfigError("model.moe_top_k", model.moe_top_k, rule, f"Set model.moe_top_k={model.num_experts} or less")
    sizes = {
        "model.num_experts": (model.num_experts, "parallel.expert", parallel.expert),
        "model.moe_ffn_hidden_size": (model.moe_ffn_hidden_size, "parallel.expert_tensor", expert_tensor_size(cfg)),
        "model.moe_shared_ffn_hidden_size": (model.moe_shared_ffn_hidden_size, "parallel.tensor", parallel.tensor),
    }
    yield from _check_divisible(sizes)
    if model.moe_expert_bias and model.moe_score != "sigmoid":
        rule = f"Megatron selects by score + bias for sigmoid scores only, and model.moe_score is {model.moe_score}"
        yield ConfigError("model.moe_expert_bias", True, rule, "Set model.moe_score=sigmoid, or model.moe_expert_bias=false")
    if (model.moe_aux_loss == "none") != (model.moe_aux_loss_coeff == 0):
        rule = f"With model.moe_aux_loss {model.moe_aux_loss} it {'is not read' if model.moe_aux_loss_coeff else 'would do nothing'}"
        way_out = "Set model.moe_aux_loss=seq_aux_loss" if model.moe_aux_loss_coeff else "Set it above 0, or model.moe_aux_loss=none"
        yield ConfigError("model.moe_aux_loss_coeff", model.moe_aux_loss_coeff, rule, way_out)
    if model.moe_suv == "shared" and expert_tensor_size(cfg) not in (1, parallel.tensor):
        rule = f"With model.moe_suv=shared it must be 1 or parallel.tensor {parallel.tensor}"
        yield ConfigError("parallel.expert_tensor", parallel.expert_tensor, rule, "Set parallel.expert_tensor=1")


def check_expert_parallel(cfg: Config) -> Iterator[ConfigError]:
    """The options that cut or overlap experts have experts to work on, and the processes divide over them."""
    model, parallel = cfg.model, cfg.parallel
    if "E" not in model.layer_pattern:
        unread = {"expert": parallel.expert > 1, "expert_tensor": (parallel.expert_tensor or 1) > 1}
        unread["shared_expert_overlap"] = parallel.shared_expert_overlap
        for name in (name for name, is_set in unread.items() if is_set):
            rule, way_out = "Is about experts, and a dense model has none", f"Leave parallel.{name} at its default"
            yield ConfigError(f"parallel.{name}", getattr(parallel, name), rule, way_out)
        return
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        rule = "Megatron trains experts with parallel.tensor above 1 only with it"
        yield ConfigError("parallel.sequence_parallel", False, rule, "Leave it null")
    if parallel.shared_expert_overlap:
        if not model.moe_shared_ffn_hidden_size:
            rule = "model.moe_shared_ffn_hidden_size is 0: there is no shared expert to overlap"
            yield ConfigError("parallel.shared_expert_overlap", True, rule, "Set parallel.shared_expert_overlap=false")
        if parallel.token_dispatcher != "alltoall":
            rule = f"Happens inside the alltoall dispatcher, and parallel.token_dispatcher is {parallel.token_dispatcher}"
            yield ConfigError("parallel.shared_expert_overlap", True, rule, "Set parallel.token_dispatcher=alltoall")
        if "shared_experts" in parallel.recompute_modules:
            rule = "Megatron cannot recompute a shared expert that overlaps"
            yield ConfigError("parallel.shared_expert_overlap", True, rule, "Take shared_experts out of parallel.recompute_modules")
    pattern = parse(cut_pattern(model.layer_pattern, pipeline_stages(cfg)))
    stages = [*pattern.stages[:-1], "".join([pattern.stages[-1], *pattern.depths])]
    for rank in range(parallel.pipeline if len(stages) == pipeline_stages(cfg) else 0):
        if not any("E" in stage for stage in stages[rank :: parallel.pipeline]):
            rule = f"Pipeline rank {rank} gets no E layer; Megatron's gradient norm over the others' expert optimizers would wait for it"
            way_out = "Mark the cuts with | so that every rank has an E layer"
            yield ConfigError("model.layer_pattern", repr(model.layer_pattern), rule, way_out)
    tensor = expert_tensor_size(cfg)
    parts = parallel.expert * tensor * parallel.pipeline
    if world_size(cfg) % parts and model_parallel_size(cfg) % parts:  # otherwise the rule for all models reports it
        words = f"expert {parallel.expert} * expert_tensor {tensor} * pipeline {parallel.pipeline} = {parts}"
        got = f"{cfg.cluster.nodes} nodes * {cfg.cluster.gpus_per_node} = {world_size(cfg)} processes"
        lower = " or ".join(f"parallel.{name}" for name, size in (("expert", parallel.expert), ("expert_tensor", tensor)) if size > 1)
        way_out = f"Set cluster.nodes * cluster.gpus_per_node to a multiple of {parts}, or lower {lower}"
        yield ConfigError("cluster.gpus_per_node", got, f"Must be a multiple of {words}", way_out)


def check_recompute(cfg: Config) -> Iterator[ConfigError]:
    """Recomputed modules exist."""
    for module in cfg.parallel.recompute_modules:
        if (symbol := layer_with(module)) not in cfg.model.layer_pattern:
            rule = f"model.layer_pattern has no {symbol} layer to recompute it in"
            yield ConfigError("parallel.recompute_modules", module, rule, f"Take {module} out of parallel.recompute_modules")


def check_mamba(cfg: Config) -> Iterator[ConfigError]:
    """An M layer has heads, in whole groups, and they divide over the ranks."""
    model, parallel = cfg.model, cfg.parallel
    if "M" not in model.layer_pattern:
        return
    if not model.mamba_num_heads:
        rule = f"model.layer_pattern {model.layer_pattern!r} has M layers"
        yield ConfigError("model.mamba_num_heads", 0, rule, "Set model.mamba_num_heads, or take M out of the pattern")
        return
    if model.mamba_num_heads % model.mamba_num_groups:
        rule = f"Must be a multiple of model.mamba_num_groups {model.mamba_num_groups}"
        way_out = f"Set model.mamba_num_heads={round_up(model.mamba_num_heads, model.mamba_num_groups)}"
        yield ConfigError("model.mamba_num_heads", model.mamba_num_heads, rule, way_out)
    else:
        groups = {"model.mamba_num_groups": (model.mamba_num_groups, "parallel.tensor", parallel.tensor)}
        yield from _check_divisible(groups)
        yield from _check_mamba_context(cfg)
    if cfg.data.confine_attention:
        rule = "M layers carry their state from one document of a sequence into the next"
        yield ConfigError("data.confine_attention", True, rule, "Set data.confine_attention=false")


def _check_mamba_context(cfg: Config) -> Iterator[ConfigError]:
    """Within an M layer the context-parallel ranks hold whole sequences of some heads each."""
    model, tensor, context = cfg.model, cfg.parallel.tensor, cfg.parallel.context
    if model.mamba_num_heads % (tensor * context):
        rule = f"Its heads are split over the ranks, so it must be a multiple of parallel.tensor {tensor} * context {context}"
        way_out = f"Set model.mamba_num_heads={round_up(model.mamba_num_heads, math.lcm(tensor * context, model.mamba_num_groups))}"
        yield ConfigError("model.mamba_num_heads", model.mamba_num_heads, rule, way_out)
    groups = model.mamba_num_groups // tensor
    if groups and groups % context and context % groups:
        rule = f"Its {groups} groups on a tensor-parallel rank must divide parallel.context {context}, or be a multiple of it"
        yield ConfigError("model.mamba_num_groups", model.mamba_num_groups, rule, f"Set model.mamba_num_groups={tensor * context}")


def _check_divisible(sizes: dict[str, tuple[int, str, int]]) -> Iterator[ConfigError]:
    for key, (size, split, ranks) in sizes.items():
        if size % ranks:
            rule = f"Is split over {split} {ranks}, so it must be a multiple of it"
            yield ConfigError(key, size, rule, f"Set {key}={round_up(size, ranks)}, or another {split}")


def check_prediction(cfg: Config) -> Iterator[ConfigError]:
    """What a model with prediction depths may not be combined with: Megatron would train another function, or stop."""
    if not parse(cfg.model.layer_pattern).depths:
        return
    parallel = cfg.parallel
    drop = "take / and what follows out of model.layer_pattern"
    if cfg.data.confine_attention:
        rule = "A prediction depth reads the next token's embedding, which at a document's end is another document's"
        yield ConfigError("data.confine_attention", True, rule, f"Set data.confine_attention=false, or {drop}")
    if parallel.recompute == "full" and parallel.recompute_method == "uniform" and parallel.recompute_num_layers > 1:
        rule = "Megatron recomputes prediction depths in groups of one layer"
        yield ConfigError("parallel.recompute_num_layers", parallel.recompute_num_layers, rule, "Set parallel.recompute_num_layers=1")


CHECKS = (check_experts, check_expert_parallel, check_recompute, check_mamba, check_prediction)
