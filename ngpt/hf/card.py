"""README.md of an exported model: what it is, what it was trained on, how well it does, and how to open it. It names no machine's paths."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ngpt.analysis import metrics
from ngpt.analysis.formats import count, full_count
from ngpt.config.activations import ACTIVATIONS
from ngpt.config.errors import ConfigError
from ngpt.config.layers import LAYERS
from ngpt.config.pattern import parse
from ngpt.config.schema import Config, DataSource, ModelConfig
from ngpt.data.manifest import SplitInfo, TokenizerInfo, split_of
from ngpt.estimate.counts import ParameterCounts, count_layer, count_parameters
from ngpt.files import write_synced
from ngpt.recipes import joined_names

FILE = "README.md"
FORMATS = {"none": "{dtype}", "fp8": "FP8 on {dtype}", "mxfp8": "MXFP8 on {dtype}", "nvfp4": "NVFP4 on {dtype}"}
DTYPES = {"fp32": "FP32", "bf16": "BF16", "float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}
PARITY_NOT_RUN = "not run"


@dataclass(frozen=True)
class Row:
    label: str
    value: str


def write_card(
    folder: Path,
    cfg: Config,
    step: int,
    dtype: str,
    parity: str | None,
    run_dir: Path,
    remote_code: bool,
    tokenizer: bool = True,
) -> Path:
    """Write the model card of an export.

    Args:
        folder: Of the export; exists.
        cfg: The run's config, resolved.
        step: Of the checkpoint, in steps of the optimizer.
        dtype: Of the stored weights, as torch names it ("bfloat16").
        parity: What the comparison of exported and trained model found, in words; None: there was none.
        run_dir: The run's folder. Its metrics.jsonl, its environment.json and its data's manifests are used where they exist.
        remote_code: Whether the folder holds Python code that opens it.
        tokenizer: Whether it holds a tokenizer.

    Returns:
        The card's path.
    """
    environment = Environment(loader=PackageLoader("ngpt", "hf"), autoescape=False, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["cell"] = _cell
    model = cfg.model
    ngpt, counts = model.architecture == "ngpt", count_parameters(model)
    trained, active = counts.total_without_padding - counts.prediction, _active(model, counts)
    summary = _read(run_dir / "summary.json")
    text = environment.get_template("card.md.j2").render(
        title=cfg.run.name,
        tags=list(_tags(model, remote_code)),
        kind=_kind(model),
        parameters=count(trained),
        active=count(active) if active < trained else "",
        steps_said=_steps_said(cfg, step),
        ngpt=ngpt,
        mamba="M" in parse(model.layer_pattern).trunk,
        experts="E" in parse(model.layer_pattern).trunk,
        remote_code=remote_code,
        tokenizer=tokenizer,
        architecture=list(_architecture(model, trained, counts)),
        data=list(_data(cfg, _splits(cfg.data.train))),
        training=list(_training(cfg, step, summary)),
        results=list(_results(cfg, _records(run_dir, step), summary, step)),
        results_note=_results_note(cfg),
        export=list(_export(step, dtype, parity)),
        origin=list(_origin(run_dir)),
        seq_length=f"{cfg.train.seq_length:,}",
    )
    path = folder / FILE
    write_synced(path, text)
    return path


def _cell(text: str) -> str:
    """Text as one cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _tags(model: ModelConfig, remote_code: bool) -> Iterator[str]:
    yield from ("pretrained", "megatron-core", model.architecture)
    layers = parse(model.layer_pattern).trunk
    if "M" in layers:
        yield "mamba2"
    if "E" in layers:
        yield "moe"
    if remote_code:
        yield "custom_code"


def _kind(model: ModelConfig) -> str:
    layers = parse(model.layer_pattern).trunk
    norm, name = ("normalized", "nGPT") if model.architecture == "ngpt" else ("pre-norm", "GPT")
    body = "transformer" if "M" not in layers else "hybrid of Mamba-2 and attention" if "*" in layers else "Mamba-2 model"
    return f"A {norm} {'mixture-of-experts ' if 'E' in layers else ''}{body} ({name})"


def _active(model: ModelConfig, counts: ParameterCounts) -> int:
    """Parameters that one token makes use of, prediction depths and padding left out."""
    experts = parse(model.layer_pattern).trunk.count("E")
    return counts.total_without_padding - counts.prediction - (experts * count_layer(model, "E").idle if experts else 0)


def _steps_said(cfg: Config, step: int) -> str:
    tokens = count(step * cfg.train.global_batch_size * cfg.train.seq_length)
    if step < cfg.train.steps:
        return f"The weights are those after step {step:,} of a schedule of {cfg.train.steps:,}, {tokens} tokens in."
    return f"The weights are those at the end of its training, after {step:,} steps and {tokens} tokens."


def _architecture(model: ModelConfig, trained: int, counts: ParameterCounts) -> Iterator[Row]:
    pattern = parse(model.layer_pattern)
    layers = pattern.trunk
    yield Row("Parameters", f"{full_count(trained)}, rows that pad the vocabulary left out")
    if (active := _active(model, counts)) < trained:
        yield Row("Parameters that a token uses", full_count(active))
    if pattern.depths:
        depths = f"{len(pattern.depths)} multi-token prediction depth{'s' if len(pattern.depths) > 1 else ''}"
        yield Row("Trained with", f"{depths}, {full_count(counts.prediction)} parameters that are not counted above")
    numbers = [f"{layers.count(symbol)} {kind.long_title}" for symbol, kind in LAYERS.items() if symbol in layers]
    yield Row("Layers", ", ".join(numbers))
    if layers.replace("*-", ""):
        yield Row("Layer pattern", f"`{layers}` ({', '.join(f'{symbol} {kind.long_title}' for symbol, kind in LAYERS.items())})")
    yield Row("Hidden size", f"{model.hidden_size:,}")
    if "-" in layers:
        yield Row("MLP size", f"{model.ffn_hidden_size:,}")
    if "*" in layers:
        groups = f", {model.num_query_groups} key-value heads" if model.num_query_groups != model.num_attention_heads else ""
        yield Row("Attention", f"{model.num_attention_heads} heads of {model.head_dim}{groups}")
        positions = {"rope": f"rotary, base {model.rope_base:,}", "none": "none but the causal mask"}
        yield Row("Positions", positions[model.position_embedding])
    if "M" in layers:
        shape = f"{model.mamba_num_heads} heads of {model.mamba_head_dim}, state {model.mamba_state_dim}"
        yield Row("Mamba-2", f"{shape}, {model.mamba_num_groups} groups, convolution over {model.mamba_conv_kernel} tokens")
    if "E" in layers:
        shared = f", a shared expert of size {model.moe_shared_ffn_hidden_size:,}" if model.moe_shared_ffn_hidden_size else ""
        routed = f"{model.num_experts} of size {model.moe_ffn_hidden_size:,}, {model.moe_top_k} a token by {model.moe_score}"
        yield Row("Experts", routed + shared)
    if "-" in layers or "E" in layers:
        yield Row("Activation", ACTIVATIONS[model.activation].title)
    tied = ", embedding and output matrix shared" if model.tied_embeddings else ""
    yield Row("Vocabulary", f"{model.vocab_size:,}{tied}")


def _splits(sources: list[DataSource]) -> list[tuple[TokenizerInfo, SplitInfo] | None]:
    """Tokenizer and split of each source; None where its manifest is gone."""
    found: list[tuple[TokenizerInfo, SplitInfo] | None] = []
    for source in sources:
        try:
            manifest, name = split_of(source.path)
            found.append((manifest.tokenizer, manifest.splits[name]))
        except (ConfigError, OSError):
            found.append(None)
    return found


def _data(cfg: Config, splits: list[tuple[TokenizerInfo, SplitInfo] | None]) -> Iterator[Row]:
    if cfg.data.mock:
        yield Row("Training data", "random tokens: a test of the training loop, not a model of language")
    total = sum(source.weight for source in cfg.data.train)
    for source, known in zip(cfg.data.train, splits, strict=True):
        share = f"{source.weight / total:.1%} of the blend" if len(cfg.data.train) > 1 else ""
        size = f"{full_count(known[1].tokens)} tokens, {full_count(known[1].documents)} documents" if known else ""
        yield Row("Training data", ", ".join(filter(None, (f"`{_short(source.path)}`", size, share))))
    for source in cfg.data.valid:
        yield Row("Validation data", f"`{_short(source.path)}`")
    info = next((known[0] for known in splits if known), None)
    named = info.hub if info and info.hub else cfg.tokenizer.name
    size = f", {info.vocab_size:,} entries" if info else ""
    kind = f" ({cfg.tokenizer.kind})" if cfg.tokenizer.kind != named else ""
    yield Row("Tokenizer", f"{named}{kind}{size}")
    yield Row("Attention across documents", "no" if cfg.data.confine_attention else "yes")


def _short(path: str) -> str:
    """The last folder and the split of a prefix. What comes before belongs to one machine."""
    return "/".join(Path(path).parts[-2:]).lstrip("/")


def _training(cfg: Config, step: int, summary: Mapping[str, Any]) -> Iterator[Row]:
    sequences, length = cfg.train.global_batch_size, cfg.train.seq_length
    yield Row("Steps", f"{step:,}" + (f" of {cfg.train.steps:,}" if step != cfg.train.steps else ""))
    yield Row("Tokens seen", full_count(step * sequences * length))
    yield Row("Batch", f"{sequences:,} sequences of {length:,} tokens ({count(sequences * length)} tokens)")
    optim = cfg.optim
    decay = f", weight decay {optim.weight_decay:g}" if optim.weight_decay else ", no weight decay"
    clip = f", gradients clipped at {optim.clip_grad:g}" if optim.clip_grad else ""
    yield Row("Optimizer", f"AdamW, beta {optim.beta1:g} and {optim.beta2:g}, epsilon {optim.eps:g}{decay}{clip}")
    yield Row("Learning rate", _schedule(cfg))
    yield Row("Precision", _precision(cfg, "emulated" in str(summary.get("executor"))))
    yield Row("Layout", _layout(cfg))
    yield Row("Seed", str(cfg.train.seed))


def _schedule(cfg: Config) -> str:
    schedule, optim = cfg.schedule, cfg.optim
    warmup = f"after {schedule.warmup_steps:,} steps of warm-up, " if schedule.warmup_steps else ""
    end = {
        "constant": "constant",
        "linear": f"linear decay to {optim.min_lr:g}",
        "cosine": f"cosine decay to {optim.min_lr:g}",
        "wsd": f"constant, with a decay to {optim.min_lr:g} over the last {schedule.decay_fraction:.0%} of the steps "
        f"({schedule.wsd_decay.replace('_', ' ')})",
    }[schedule.decay]
    return f"{optim.lr:g}, {warmup}{end}"


def _precision(cfg: Config, emulated: bool) -> str:
    precision = cfg.precision
    shape = FORMATS[precision.format].format(dtype=DTYPES[precision.dtype])
    kept = []
    if precision.format != "none":
        kept += [f"first {precision.num_layers_at_start_in_bf16} blocks"] if precision.num_layers_at_start_in_bf16 else []
        kept += [f"last {precision.num_layers_at_end_in_bf16} blocks"] if precision.num_layers_at_end_in_bf16 else []
        kept += [f"`{name}`" for name in precision.bf16_modules]
        kept += [f"the last {precision.bf16_tail:.0%} of the steps"] if precision.bf16_tail else []
    without = f"; without {precision.format.upper()}: {', '.join(kept)}" if kept else ""
    return f"recipe {joined_names(precision.name, precision.layers.values())}, {shape}{', emulated' if emulated else ''}{without}"


def _layout(cfg: Config) -> str:
    parallel, devices = cfg.parallel, cfg.cluster.nodes * cfg.cluster.gpus_per_node
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    split = [f"{name.replace('_', ' ')} parallel {size}" for name in names if (size := getattr(parallel, name)) and size > 1]
    data = devices // (parallel.tensor * parallel.pipeline * parallel.context)
    split += [f"data parallel {data}"] if data > 1 else []
    noun = "processes" if devices > 1 else "process"
    return ", ".join([f"{devices:,} {noun}" + (f" on {cfg.cluster.nodes:,} nodes" if cfg.cluster.nodes > 1 else ""), *split])


def _records(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The logged steps up to that of the checkpoint."""
    try:
        return [record for record in metrics.read(run_dir / "metrics.jsonl") if record["step"] <= step]
    except (ConfigError, OSError):
        return []


def _results(cfg: Config, records: list[dict[str, Any]], summary: Mapping[str, Any], step: int) -> Iterator[Row]:
    """Each loss as last logged by then. With one validation split also in bits per byte."""
    for label, key in (("Training loss", "train_loss"), ("Validation loss", "val_loss")):
        if logged := _last(records, key):
            yield Row(label, f"{logged[1]:.4f} nats per token, step {logged[0]:,}")
    known = _splits(cfg.data.valid)
    if (logged := _last(records, "val_loss")) and len(known) == 1 and known[0] and known[0][1].bytes_of_text:
        split = known[0][1]
        bits = logged[1] / math.log(2) * split.tokens / split.bytes_of_text
        yield Row("Validation loss", f"{bits:.4f} bits per byte, step {logged[0]:,}")
    elif summary.get("steps") == step and _is_finite(summary.get("val_bits_per_byte")):
        yield Row("Validation loss", f"{summary['val_bits_per_byte']:.4f} bits per byte, step {step:,}")


def _last(records: list[dict[str, Any]], key: str) -> tuple[int, float] | None:
    """The newest finite value of a figure, and its step."""
    return next(((record["step"], record[key]) for record in reversed(records) if _is_finite(record.get(key))), None)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _results_note(cfg: Config) -> str:
    train = cfg.train
    if cfg.data.mock or not cfg.data.valid:
        return "Losses are those that the run logged."
    if train.eval_whole_split:
        return "Losses are those that the run logged. Validation reads its whole split."
    sequences = train.eval_sequences or train.eval_steps * train.global_batch_size
    return f"Losses are those that the run logged. Validation reads {sequences:,} sequences of {train.seq_length:,} tokens."


def _export(step: int, dtype: str, parity: str | None) -> Iterator[Row]:
    yield Row("Checkpoint", f"step {step:,}")
    name = dtype.removeprefix("torch.")
    yield Row("Weights", DTYPES.get(name, name))
    yield Row("Comparison with the trained model", parity or PARITY_NOT_RUN)


def _origin(run_dir: Path) -> Iterator[Row]:
    """Commit and versions of the run's last launch."""
    launch = _read(run_dir / "environment.json")
    git, versions = launch.get("git"), launch.get("versions")
    git, versions = git if isinstance(git, dict) else {}, versions if isinstance(versions, dict) else {}
    if git.get("commit"):
        yield Row("Commit", f"`{git['commit']}`" + (", with changes that are not committed" if git.get("dirty") else ""))
    installed = [f"{name} {version}" for name, version in versions.items() if version]
    if installed:
        yield Row("Versions", ", ".join(installed))
    if gpus := launch.get("gpus"):
        kinds = dict.fromkeys(map(str, gpus))
        yield Row("GPUs of a node", ", ".join(f"{[*map(str, gpus)].count(kind)} {kind}" for kind in kinds))


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of the run folder; empty where it is absent or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
