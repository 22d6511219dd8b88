"""The rules between keys: what a type or a range cannot say. Each check yields one error for each rule broken."""

from collections.abc import Iterator

from ngpt.config import cluster, hybrid, precision, values
from ngpt.config.errors import ConfigError, ConfigErrors
from ngpt.config.layers import LAYERS
from ngpt.config.megatron_arguments import check_megatron
from ngpt.config.megatron_keys import captures
from ngpt.config.pattern import parse
from ngpt.config.schema import Config
from ngpt.config.sizes import (
    data_parallel_size,
    micro_batches_per_step,
    model_parallel_size,
    padded_vocab_size,
    pipeline_stages,
    round_up,
    world_size,
    wsd_decay_steps,
)
from ngpt.config.vocabularies import FILES, NAMED_BY_PATH

BYTE_VOCABULARY = 257  # 256 bytes and the end of a document
_LAYERS = ", ".join(f"{symbol} ({kind.long_title})" for symbol, kind in LAYERS.items())
_SYMBOLS = f"Use {_LAYERS}, | for a pipeline cut and / before a prediction depth"


def validate(cfg: Config) -> None:
    """Raises a `ConfigError` with every rule that a resolved config breaks."""
    # Rules between keys divide by values, so values come first. Those of a precision read checked layers and shards, so they come last.
    for group in (values.CHECKS, (*CHECKS, *hybrid.CHECKS, *cluster.CHECKS), *precision.CHECKS):
        errors = [error for check in group for error in check(cfg)]
        if errors:
            raise errors[0] if len(errors) == 1 else ConfigErrors(errors)


def check_heads(cfg: Config) -> Iterator[ConfigError]:
    """Head size and query groups follow from the number of heads."""
    model = cfg.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.head_dim is None:
        rule = f"model.hidden_size {model.hidden_size} is not a multiple of {heads} heads, so no head size follows"
        yield ConfigError("model.num_attention_heads", heads, rule, "Set a divisor of model.hidden_size, or set model.head_dim")
    elif model.position_embedding == "rope" and model.head_dim % 2:
        yield ConfigError("model.head_dim", model.head_dim, "RoPE rotates pairs, so it must be even", "Set an even model.head_dim")
    if heads % groups:
        rule = f"Must divide model.num_attention_heads {heads}"
        yield ConfigError("model.num_query_groups", groups, rule, f"Set one of {_divisors(heads)}")


def check_pattern(cfg: Config) -> Iterator[ConfigError]:
    """The layer pattern holds known layers, as many as `model.num_layers`, and prediction depths that are alike."""
    key, pattern, layers = "model.layer_pattern", cfg.model.layer_pattern, cfg.model.num_layers
    unknown = sorted(set(pattern) - {*LAYERS, "|", "/"})
    if unknown:
        rule = f"Unknown symbol {' '.join(symbol if symbol.strip() else repr(symbol) for symbol in unknown)}"
        yield ConfigError(key, repr(pattern), rule, _SYMBOLS)
    trunk, depths = parse(pattern).trunk, parse(pattern).depths
    if not trunk:
        rule = f"Has no layers{' before its first /' * bool(depths)}"
        yield ConfigError(key, repr(pattern), rule, "Write the layers of the model there")
    elif (blocks := len(parse(pattern).blocks)) != layers:
        rule = f"Holds {blocks} layers{' before its first /' * bool(depths)}, each *- counted as one, but model.num_layers is {layers}"
        ends = ". precision.num_layers_at_*_in_bf16 count blocks like it" if len(trunk) == layers else ""
        yield ConfigError(key, repr(pattern), rule, f"Set model.num_layers={blocks}, or correct the pattern{ends}")
    if not all(depths):
        rule = "/ begins the layers of a multi-token prediction depth, and none follow"
        yield ConfigError(key, repr(pattern), rule, "Write the layers of the depth after each /, or drop it")
    elif len(set(depths)) > 1:
        rule = f"Megatron builds every prediction depth alike, and {depths[0]} differs from {next(d for d in depths if d != depths[0])}"
        yield ConfigError(key, repr(pattern), rule, f"Write {'/'.join([depths[0]] * len(depths))} after the model's own layers")
    if any("|" in depth for depth in depths):
        rule = "| cuts the model's own layers; all prediction depths run on the last pipeline stage"
        yield ConfigError(key, repr(pattern), rule, "Drop every | after the first /")


def check_pipeline(cfg: Config) -> Iterator[ConfigError]:
    """The layers divide over the pipeline stages."""
    parallel, pattern = cfg.parallel, cfg.model.layer_pattern
    trunk, parts = parse(pattern).trunk, parse(pattern).stages
    stages = pipeline_stages(cfg)
    sizes = f"parallel.pipeline {parallel.pipeline} * virtual_pipeline {parallel.virtual_pipeline or 1} = {stages} stages"
    if (parallel.virtual_pipeline or 1) > 1 and parallel.pipeline == 1:
        rule = "Model chunks are interleaved between pipeline ranks, and there is one"
        yield ConfigError("parallel.virtual_pipeline", parallel.virtual_pipeline, rule, "Set parallel.pipeline=2 or more, or leave it null")
    if len(parts) > 1:
        if len(parts) != stages or not all(parts):
            rule = f"| must cut it into as many non-empty parts as {sizes}"
            placed = ", or drop every | to have them placed" if trunk == "*-" * (len(trunk) // 2) else ""
            way_out = f"Write {stages} parts{placed}" if stages > 1 else "Drop every |, or set parallel.pipeline"
            yield ConfigError("model.layer_pattern", repr(pattern), rule, way_out)
    elif stages > 1 and trunk != "*-" * (len(trunk) // 2):
        rule = f"A pattern other than *- repeated is not cut into {sizes} by itself"
        yield ConfigError("model.layer_pattern", repr(pattern), rule, "Mark the cuts with |")
    elif len(trunk) // 2 % stages:
        layers = len(trunk) // 2
        rule = f"{layers} layers of attention and MLP do not divide over {sizes}"
        way_out = f"Let the stages be one of {_divisors(layers)}, or cut model.layer_pattern with |"
        yield ConfigError("parallel.pipeline", parallel.pipeline, rule, way_out)


def check_tensor(cfg: Config) -> Iterator[ConfigError]:
    """What tensor parallelism splits is a multiple of it."""
    model, tensor = cfg.model, cfg.parallel.tensor
    sizes = {
        "model.num_attention_heads": model.num_attention_heads,
        # Megatron would repeat groups on several ranks; sqk and the norms over heads are not built for that.
        "model.num_query_groups": model.num_query_groups,
    }
    if "-" in model.layer_pattern:
        sizes["model.ffn_hidden_size"] = model.ffn_hidden_size
    for key, size in sizes.items():
        if size % tensor:
            rule = f"Is split over parallel.tensor {tensor}, so it must be a multiple of it"
            yield ConfigError(key, size, rule, f"Set {key}={round_up(size, tensor)}, or parallel.tensor to one of {_divisors(size)}")
    padded = padded_vocab_size(model)
    if padded % tensor:
        rule = f"Pads the vocabulary to {padded}, which parallel.tensor {tensor} must divide"
        multiple = model.vocab_padding_multiple
        yield ConfigError("model.vocab_padding_multiple", multiple, rule, f"Set a multiple of {tensor}")
    if cfg.parallel.sequence_parallel and tensor == 1:
        rule = "Splits the sequence over parallel.tensor, which is 1"
        yield ConfigError("parallel.sequence_parallel", True, rule, "Leave it null, or set parallel.tensor=2 or more")


def check_sequence(cfg: Config) -> Iterator[ConfigError]:
    """The sequence divides over context and sequence parallel ranks."""
    seq_length, context, tensor = cfg.train.seq_length, cfg.parallel.context, cfg.parallel.tensor
    unit = 2 * context if context > 1 else 1  # each context rank takes one slice from each end, so that causal work is equal
    rule = f"Must be a multiple of 2 * parallel.context {context}" if context > 1 else ""
    if cfg.parallel.sequence_parallel:
        unit *= tensor
        rule = f"{rule or 'Must be a multiple'} {'* ' if rule else 'of '}parallel.tensor {tensor} (sequence parallel)"
    if seq_length % unit:
        yield ConfigError("train.seq_length", seq_length, f"{rule} = {unit}", f"Set train.seq_length={round_up(seq_length, unit)}")
    if context > 1 and cfg.data.confine_attention:
        rule = "Needs whole documents on a rank, and parallel.context splits the sequence"
        yield ConfigError("data.confine_attention", True, rule, "Set data.confine_attention=false or parallel.context=1")


def check_world(cfg: Config) -> Iterator[ConfigError]:
    """Processes, model copies and batches divide evenly."""
    world, parts = world_size(cfg), model_parallel_size(cfg)
    if world % parts:
        parallel, cluster = cfg.parallel, cfg.cluster
        got = f"{cluster.nodes} nodes * {cluster.gpus_per_node} = {world} processes"
        rule = f"Must be a multiple of tensor {parallel.tensor} * pipeline {parallel.pipeline} * context {parallel.context} = {parts}"
        yield ConfigError("cluster.gpus_per_node", got, rule, f"Set cluster.nodes * cluster.gpus_per_node to a multiple of {parts}")
        return
    yield from _check_batch(cfg)


def _check_batch(cfg: Config) -> Iterator[ConfigError]:
    train, copies = cfg.train, data_parallel_size(cfg)
    unit = train.micro_batch_size * copies
    if train.global_batch_size % unit:
        rule = f"Must be a multiple of train.micro_batch_size {train.micro_batch_size} * data parallel {copies} = {unit}"
        way_out = f"Set train.global_batch_size={round_up(train.global_batch_size, unit)}"
        if train.global_batch_size % copies == 0:
            way_out += f", or train.micro_batch_size to one of {_divisors(train.global_batch_size // copies)}"
        yield ConfigError("train.global_batch_size", train.global_batch_size, rule, way_out)
    elif (cfg.parallel.virtual_pipeline or 1) > 1 and micro_batches_per_step(cfg) % cfg.parallel.pipeline:
        steps = f"Gives {micro_batches_per_step(cfg)} micro-batches a step"
        rule = f"{steps}; interleaving needs a multiple of parallel.pipeline {cfg.parallel.pipeline}"
        way_out = f"Set train.global_batch_size={round_up(train.global_batch_size, unit * cfg.parallel.pipeline)}"
        yield ConfigError("train.global_batch_size", train.global_batch_size, rule, way_out)


def check_optimizer(cfg: Config) -> Iterator[ConfigError]:
    """Learning rates, and the optimizer against precision, overlap and recompute."""
    parallel, optim = cfg.parallel, cfg.optim
    if optim.min_lr > optim.lr:
        yield ConfigError("optim.min_lr", optim.min_lr, f"Must not exceed optim.lr {optim.lr}", "Lower optim.min_lr or raise optim.lr")
    if (taken := optim.lr * optim.weight_decay) >= 1:
        rule = f"A step takes optim.lr * optim.weight_decay = {taken:.3g} of the weights, which leaves nothing of them"
        yield ConfigError("optim.weight_decay", optim.weight_decay, rule, f"Set it below {1 / optim.lr:.3g}")
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        rule = "Needs parallel.distributed_optimizer and parallel.overlap_grad_reduce"
        yield ConfigError("parallel.overlap_param_gather", True, rule, "Set all three to true, or this one to false")
    if cfg.precision.dtype == "bf16" and not parallel.distributed_optimizer:
        rule = "bf16 models keep fp32 scales, which Megatron can only checkpoint under the distributed optimizer"
        yield ConfigError("parallel.distributed_optimizer", False, rule, "Set parallel.distributed_optimizer=true, or precision=fp32")
    if parallel.recompute_modules and parallel.recompute != "selective":
        rule = f"Is read by parallel.recompute=selective only, not {parallel.recompute}"
        modules = parallel.recompute_modules
        yield ConfigError("parallel.recompute_modules", modules, rule, "Set parallel.recompute=selective, or the list to []")


def check_schedule(cfg: Config) -> Iterator[ConfigError]:
    """Everything counted in steps fits into the run."""
    train, schedule, debug = cfg.train, cfg.schedule, cfg.debug
    decay = wsd_decay_steps(cfg)
    if schedule.warmup_steps + decay >= train.steps + (decay > 0):
        rule = f"Warm-up {schedule.warmup_steps} and decay {decay} must fit into train.steps {train.steps}"
        yield ConfigError("schedule.warmup_steps", schedule.warmup_steps, rule, "Shorten the warm-up or raise train.steps")
    if train.stop_after is not None and train.stop_after > train.steps:
        yield ConfigError("train.stop_after", train.stop_after, f"Must not exceed train.steps {train.steps}", "Lower it or leave it null")
    if cfg.logging.health_interval % cfg.logging.interval:
        health, interval = cfg.logging.health_interval, cfg.logging.interval
        rule, way_out = f"Must be a multiple of logging.interval {interval}", f"Set logging.health_interval={round_up(health, interval)}"
        yield ConfigError("logging.health_interval", health, rule, way_out)
    if debug.profile and not debug.profile_start < debug.profile_stop <= train.steps:
        got = f"{debug.profile_start} to {debug.profile_stop}"
        rule = f"The window must end after it starts and by train.steps {train.steps}"
        yield ConfigError("debug.profile_stop", got, rule, "Correct debug.profile_start and debug.profile_stop")
    outside = [rank for rank in debug.profile_ranks if not 0 <= rank < world_size(cfg)]
    if debug.profile and outside:
        yield ConfigError("debug.profile_ranks", outside, f"Ranks go from 0 to {world_size(cfg) - 1}", "Name ranks of this run")


def check_refused_steps(cfg: Config) -> Iterator[ConfigError]:
    """Megatron's own check of gradients raises on one rank, before all ranks decide what to do with the step."""
    name, policy = "check_for_nan_in_loss_and_grad", cfg.train.on_nonfinite
    if cfg.megatron.get(name) and policy != "stop":
        rule = f"Ends the run on the rank that sees NaN or Inf, and train.on_nonfinite={policy} would go on"
        yield ConfigError(f"megatron.{name}", True, rule, "Remove it, or set train.on_nonfinite=stop")


def check_eval_tasks(cfg: Config) -> Iterator[ConfigError]:
    """lm-eval's tasks are evaluated where data.valid is, on whole sequences."""
    train = cfg.train
    if not train.eval_tasks:
        return
    if not (cfg.data.valid or cfg.data.mock) or not (train.eval_whole_split or train.eval_sequences or train.eval_steps):
        rule = "Tasks are evaluated behind data.valid, and there is no evaluation"
        yield ConfigError("train.eval_tasks", train.eval_tasks, rule, "Set data.valid and train.eval_steps")
    if train.eval_tasks_interval is not None and train.eval_tasks_interval % train.eval_interval:
        rule = f"Must be a multiple of train.eval_interval {train.eval_interval}: tasks are evaluated behind data.valid"
        yield ConfigError("train.eval_tasks_interval", train.eval_tasks_interval, rule, "Set a multiple, or null")
    if cfg.parallel.context > 1:
        rule = f"parallel.context {cfg.parallel.context} cuts sequences, and texts of tasks are scored whole"
        yield ConfigError("train.eval_tasks", train.eval_tasks, rule, "Leave them out, and use ngpt eval on the checkpoints")


def check_data(cfg: Config) -> Iterator[ConfigError]:
    """There is text to train and validate on, and the model has a row for each of its tokens."""
    data, tokenizer = cfg.data, cfg.tokenizer
    if data.mock and (data.train or data.valid):
        named = " and ".join(f"data.{name}" for name in ("train", "valid") if getattr(data, name))
        rule = f"Random tokens leave {named} unread"
        yield ConfigError("data.mock", True, rule, f"Add data.mock=false to read text, or leave out {named}")
    if not data.mock and not data.train:
        way_out = "Choose data=NAME, or set 'data.train=[{path: data/x/train, weight: 1}]' to what `ngpt data prepare` wrote"
        yield ConfigError("data.train", "Empty", "A run needs text", way_out)
    asks = {"eval_whole_split": "false", "eval_sequences": "null", "eval_steps": "0"}
    asking = [key for key in asks if getattr(cfg.train, key)]
    if not data.mock and not data.valid and asking:
        rule = f"train.{asking[0]} {getattr(cfg.train, asking[0])} needs validation data"
        yield ConfigError("data.valid", "Empty", rule, f"Set data.valid, or {' '.join(f'train.{key}={asks[key]}' for key in asking)}")
    if data.mock and cfg.train.eval_whole_split:
        yield ConfigError("train.eval_whole_split", True, "Mock tokens have no end", "Set train.eval_sequences")
    if cfg.train.eval_whole_split and cfg.train.eval_sequences is not None:
        rule = "train.eval_whole_split=true reads every sequence"
        yield ConfigError("train.eval_sequences", cfg.train.eval_sequences, rule, "Leave one of the two out")
    if data.reset_positions and not data.confine_attention:
        rule = "Restarted positions put two documents in the same place, and attention crosses documents"
        yield ConfigError("data.reset_positions", True, rule, "Set data.confine_attention=true, or data.reset_positions=false")
    known = BYTE_VOCABULARY if tokenizer.kind == "bytes" else tokenizer.vocab_size
    if known is not None and cfg.model.vocab_size < known:
        rule = f"The tokenizer {tokenizer.name} has {known} tokens"
        yield ConfigError("model.vocab_size", cfg.model.vocab_size, rule, f"Set model.vocab_size={known} or more")
    if tokenizer.kind in NAMED_BY_PATH and tokenizer.path is None:
        way_out = f"Set tokenizer.path to its {FILES[tokenizer.kind]}"
        yield ConfigError("tokenizer.path", None, f"A {tokenizer.kind} tokenizer is read from a file", way_out)


def check_checkpoint(cfg: Config) -> Iterator[ConfigError]:
    """Checkpoint options that would have no effect are refused."""
    checkpoint = cfg.checkpoint
    saves = checkpoint.save_at_end or checkpoint.interval is not None
    if checkpoint.interval is not None and not checkpoint.save_at_end:
        rule = "Megatron saves the end of every run that saves at all"
        yield ConfigError("checkpoint.save_at_end", False, rule, "Set checkpoint.save_at_end=true, or checkpoint.interval=null")
    if checkpoint.async_save and not saves:
        yield ConfigError("checkpoint.async_save", True, "Nothing is saved", "Set checkpoint.interval or checkpoint.save_at_end=true")
    if checkpoint.hf and not saves:
        yield ConfigError("checkpoint.hf", True, "Nothing is saved", "Set checkpoint.interval or checkpoint.save_at_end=true")
    if checkpoint.keep_every is not None and checkpoint.keep_last is None:
        rule = "Spares checkpoints from checkpoint.keep_last, which is null: all stay"
        yield ConfigError("checkpoint.keep_every", checkpoint.keep_every, rule, "Set checkpoint.keep_last=N, or leave it null")
    if checkpoint.load_optimizer and checkpoint.load is None:
        rule = "Says what to take from checkpoint.load, which is null"
        yield ConfigError("checkpoint.load_optimizer", True, rule, "Set checkpoint.load, or this to false; resuming a run needs neither")


def transformer_engine_attention(cfg: Config) -> Iterator[ConfigError]:
    """What Transformer Engine's attention cannot do; the local one can."""
    if "*" not in cfg.model.layer_pattern:
        return
    if cfg.data.confine_attention and cfg.train.micro_batch_size != 1:
        rule = "data.confine_attention with Transformer Engine packs the documents of one sequence"
        yield ConfigError("train.micro_batch_size", cfg.train.micro_batch_size, rule, "Set train.micro_batch_size=1")
    if cfg.parallel.context > 1 and cfg.precision.dtype == "fp32":
        rule = "Transformer Engine's attention over a split sequence computes in bf16, and precision.dtype is fp32"
        way_out = "Set precision=bf16, or model.transformer_impl=local, which gathers keys and values"
        yield ConfigError("parallel.context", cfg.parallel.context, rule, way_out)


def check_backend_attention(cfg: Config) -> Iterator[ConfigError]:
    """Checks attention if the config names the backend. Otherwise the backend is known only when the workers start."""
    if cfg.model.transformer_impl == "transformer_engine":
        yield from transformer_engine_attention(cfg)


def low_precision_formats(cfg: Config) -> set[str]:
    """Formats in which linears of the model multiply."""
    return {cfg.precision.format, *(recipe.format for recipe in cfg.precision.recipes.values())} - {"none"}


def check_graphs(cfg: Config) -> Iterator[ConfigError]:
    """A CUDA graph does not hold what the host decides at each step: rounding seeds, the BF16 tail, tokens of experts, documents."""
    for name, value in captures(cfg.megatron).items():
        path = f"megatron.{name}"
        if formats := low_precision_formats(cfg):
            found = " and ".join(sorted(formats))
            rule = f"A graph repeats one step's rounding seeds and keeps its format to the end; precision.format is {found}"
            yield ConfigError(path, value, rule, "Remove it, or choose precision=bf16")
        if cfg.data.confine_attention:
            rule = "A graph repeats one sequence's document boundaries, and data.confine_attention is true"
            yield ConfigError(path, value, rule, "Remove it, or set data.confine_attention=false")
        if value == "full_iteration" and cfg.train.on_spike != "note":
            rule = f"The host sees no losses of a replayed graph, and train.on_spike={cfg.train.on_spike} judges them"
            yield ConfigError(path, value, rule, "Remove it, or set train.on_spike=note")
        modules = cfg.megatron.get("cuda_graph_modules") or []
        if "E" in cfg.model.layer_pattern and (value == "full_iteration" or not modules or "moe" in modules):
            rule = "The host reads how many tokens each expert gets, so E layers cannot be captured"
            yield ConfigError(path, value, rule, "Remove it, or capture other layers: megatron.cuda_graph_modules=[attn,mamba]")
        if {"moe_router", "moe_preprocess"} & set(modules) and not cfg.megatron.get("moe_permute_fusion"):
            rule = "Without megatron.moe_permute_fusion the host reads the router's counts while it is captured, which ends the process"
            way_out = "Set megatron.moe_permute_fusion=true, or megatron.cuda_graph_modules=[attn,mamba]"
            yield ConfigError("megatron.cuda_graph_modules", modules, rule, way_out)


def check_userbuffers(cfg: Config) -> Iterator[ConfigError]:
    """What Transformer Engine's buffers need to overlap collectives with products."""
    if not cfg.megatron.get("tp_comm_overlap"):
        return
    needs = {
        "parallel.tensor above 1 with parallel.sequence_parallel": cfg.parallel.tensor > 1 and cfg.parallel.sequence_parallel,
        "precision=bf16: the buffers hold BF16": cfg.precision.dtype == "bf16" and not low_precision_formats(cfg),
        "debug.deterministic=false: Megatron does not know its order of sums": not cfg.debug.deterministic,
        "no CUDA graphs: together they were not tried": not captures(cfg.megatron),
    }
    for rule in (rule for rule, holds in needs.items() if not holds):
        yield ConfigError("megatron.tp_comm_overlap", True, f"Needs {rule}", "Remove it")


def _divisors(size: int) -> str:
    found = [divisor for divisor in range(1, min(size, 1024) + 1) if size % divisor == 0]
    return ", ".join(map(str, found[:12])) + (", ..." if len(found) > 12 else "")


CHECKS: tuple[values.Check, ...] = (
    check_heads,
    check_pattern,
    check_pipeline,
    check_tensor,
    check_sequence,
    check_world,
    check_optimizer,
    check_schedule,
    check_refused_steps,
    check_data,
    check_eval_tasks,
    check_checkpoint,
    check_megatron,
    check_graphs,
    check_userbuffers,
    check_backend_attention,
)
