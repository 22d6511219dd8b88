"""What `ngpt estimate` prints: one JSON object, or the same as a table."""

from typing import Any

from ngpt.config.pattern import parse
from ngpt.config.schema import Config
from ngpt.config.sizes import data_parallel_size, padded_vocab_size, world_size
from ngpt.estimate.calibration import LINK_FRACTION, LOW_PRECISION_GEMM_FRACTION, RESERVED
from ngpt.estimate.counts import count_parameters, mamba_scan_flops, training_flops_per_token
from ngpt.estimate.layout import ASSUMED_GPU, chunks_by_rank, executor, gpu_of
from ngpt.estimate.layouts import Layout, fits
from ngpt.estimate.memory import MemoryEstimate, estimate_memory
from ngpt.estimate.states import rank_parameters
from ngpt.estimate.step_time import StepTime, estimate_step

_GIB = 2**30


def estimate(cfg: Config, price: float | None = None) -> dict[str, Any]:
    """All estimates of a checked config as one object of numbers, strings and lists: what `--json` prints.

    Args:
        price: of one GPU for an hour, in any currency; None: no cost beyond GPU hours.
    """
    memory, step = estimate_memory(cfg), estimate_step(cfg)
    gpu = gpu_of(cfg)
    return {
        "run": cfg.run.name,
        "gpu": cfg.cluster.gpu or ASSUMED_GPU,
        "gpus": world_size(cfg),
        **_parameters(cfg),
        "flops_per_token": _flops(cfg),
        "memory": _memory(memory) | {"gpu_bytes": round(gpu.memory), "reserved_bytes": RESERVED, "fits": fits(cfg, memory)},
        "step": _step(cfg, step),
        "cost": _cost(cfg, step, price),
        "left_out": left_out(cfg),
    }


def describe_layout(layout: Layout) -> dict[str, Any]:
    """One proposal of `--fit`."""
    return {
        "overrides": list(layout.overrides),
        "peak_bytes": round(layout.memory.peak),
        "step_s": layout.step.total,
        "tokens_per_second": layout.step.tokens_per_second,
    }


def _parameters(cfg: Config) -> dict[str, Any]:
    counts = count_parameters(cfg.model)
    kinds = ("embedding", "head", "attention", "mlp", "mamba", "moe", "prediction", "logit_scale", "final_norm")
    return {
        "parameters_total": counts.total,
        "parameters_active": counts.active,
        "parameters": {kind: getattr(counts, kind) for kind in kinds},
        "parameters_per_rank": [rank_parameters(cfg, held).total for held in chunks_by_rank(cfg)],
    }


def _flops(cfg: Config) -> dict[str, int]:
    """Forward and backward of one token; recomputed work is not among them."""
    total = training_flops_per_token(cfg.model, cfg.train.seq_length)
    scan = 3 * parse(cfg.model.layer_pattern).layers.count("M") * mamba_scan_flops(cfg.model)
    matrices = 6 * count_parameters(cfg.model).matmul
    return {"total": total, "matrices": matrices, "attention": total - scan - matrices, "mamba_scan": scan}


def _memory(memory: MemoryEstimate) -> dict[str, Any]:
    sizes = {
        "weights": memory.states.weights,
        "gradients": memory.states.gradients,
        "optimizer": memory.states.optimizer,
        "activations": memory.activations,
        "temporary": memory.temporary,
        "workspace": memory.workspace,
        "peak": memory.peak,
    }
    rounded = {f"{name}_bytes": round(size) for name, size in sizes.items()}
    return rounded | {"peak_moment": memory.moment, "pipeline_rank": memory.pipeline_rank}


def _step(cfg: Config, step: StepTime) -> dict[str, Any]:
    stage, flops = step.stage, training_flops_per_token(cfg.model, cfg.train.seq_length)
    dtype = "bf16" if cfg.precision.dtype == "bf16" else "tf32"
    peak = gpu_of(cfg).rates[dtype] * step.processes
    micro_batch = {name: getattr(stage.work, name) for name in ("products", "attention", "scan", "elementwise", "loss")}
    micro_batch |= {"links": stage.links, "waiting_for_host": stage.waiting, "total": stage.total}
    return {
        "seconds": step.total,
        "tokens_per_second": step.tokens_per_second,
        "mfu": step.tokens_per_second * flops / peak,
        "micro_batches": step.micro_batches,
        "micro_batch_s": micro_batch,
        "host_s": stage.work.host,
        "bubble_s": step.bubble,
        "data_parallel_s": step.data_parallel,
        "optimizer_s": step.optimizer,
    }


def _cost(cfg: Config, step: StepTime, price: float | None) -> dict[str, Any]:
    hours = step.gpu_hours(cfg.train.steps)
    run_tokens = cfg.train.steps * step.tokens
    return {
        "steps": cfg.train.steps,
        "tokens": run_tokens,
        "days": cfg.train.steps * step.total / 86400,
        "gpu_hours": hours,
        "price_per_gpu_hour": price,
        "total": None if price is None else hours * price,
    }


def left_out(cfg: Config) -> list[str]:
    """What the estimates of this config do not see, or take for granted."""
    notes = [
        f"memory beside torch's allocations: CUDA context, NCCL buffers, fragmentation ({RESERVED / _GIB:.0f} GiB are kept free for them)",
        "evaluation, checkpoints, data loading, health panels, first steps and restarts",
    ]
    if cfg.cluster.gpu is None:
        notes.append(f"cluster.gpu is not set: {ASSUMED_GPU} is assumed")
    if (cfg.cluster.gpu or ASSUMED_GPU) != "h100":
        notes.append("this GPU was not measured: it is assumed to reach the fractions of its peak rates that an H100 does")
    if world_size(cfg) > 1:
        notes.append(
            f"links were not measured: {LINK_FRACTION:.0%} of their rate is assumed, and that only data-parallel collectives overlap"
        )
    if "E" in cfg.model.layer_pattern:
        notes.append("unbalanced routing: every expert is given equally many tokens")
    if executor(cfg) == "native":
        notes.append(f"native {cfg.precision.format} was not measured: {LOW_PRECISION_GEMM_FRACTION:.0%} of its rate is assumed")
    if cfg.precision.bf16_tail:
        notes.append(f"the last {cfg.precision.bf16_tail:g} of the steps in {cfg.precision.dtype}")
    if cfg.precision.diagnostics:
        notes.append("precision.diagnostics")
    if cfg.model.transformer_impl == "local":
        notes.append("model.transformer_impl=local: estimated as Transformer Engine, whose attention keeps no matrix of scores")
    if cfg.data.confine_attention:
        notes.append("data.confine_attention: attention is counted over whole sequences")
    if cfg.debug.deterministic:
        notes.append("debug.deterministic: slower kernels")
    if cfg.megatron:
        notes.append(f"megatron.*: {', '.join(sorted(cfg.megatron))}")
    return notes


def as_table(cfg: Config, values: dict[str, Any]) -> str:
    """The estimates as lines of text."""
    parallel, memory, step, cost = cfg.parallel, values["memory"], values["step"], values["cost"]
    micro = step["micro_batch_s"]
    kinds = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in values["parameters"].items() if count)
    per_rank = values["parameters_per_rank"]
    ranks = f"{per_rank[0]:,}" if len(set(per_rank)) == 1 else ", ".join(f"{count:,}" for count in per_rank) + " (by pipeline rank)"
    flops = values["flops_per_token"]
    layout = f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, context {parallel.context}, expert {parallel.expert}"
    layout += f", data {data_parallel_size(cfg)}, recompute {parallel.recompute}"
    rows = {
        "run": f"{values['run']} on {values['gpus']} x {values['gpu']}: {layout}",
        "parameters": f"{values['parameters_total']:,}, {values['parameters_active']:,} active for a token",
        "  by kind": kinds,
        "  a rank": ranks,
        "FLOPs a token": ", ".join(f"{name.replace('_', ' ')} {count / 1e9:.3f} GFLOP" for name, count in flops.items() if count),
        "memory a rank": f"{_gib(memory['peak_bytes'])} of {_gib(memory['gpu_bytes'])} at its peak, the {memory['peak_moment']}"
        + ("" if memory["fits"] else "; DOES NOT FIT"),
        "  states": f"weights {_gib(memory['weights_bytes'])}, gradients {_gib(memory['gradients_bytes'])}, "
        f"optimizer {_gib(memory['optimizer_bytes'])}",
        "  micro-batches": f"activations {_gib(memory['activations_bytes'])}, at the peak besides {_gib(memory['temporary_bytes'])} "
        f"(vocabulary {padded_vocab_size(cfg.model):,}), workspace {_gib(memory['workspace_bytes'])}",
        "step": f"{step['seconds']:.3g} s, {step['tokens_per_second']:,.0f} tokens/s, MFU {step['mfu']:.1%}",
        "  a micro-batch": f"{_ms(micro['total'])} x {step['micro_batches']}: products {_ms(micro['products'])}, "
        f"attention {_ms(micro['attention'])}, scan {_ms(micro['scan'])}, element-wise {_ms(micro['elementwise'])}, "
        f"loss {_ms(micro['loss'])}, links {_ms(micro['links'])}, waiting for the host {_ms(micro['waiting_for_host'])}",
        "  once": f"optimizer {_ms(step['optimizer_s'])}, pipeline bubble {_ms(step['bubble_s'])}, "
        f"gradients and weights on the way {_ms(step['data_parallel_s'])}",
        "whole run": f"{cost['steps']:,} steps, {cost['tokens']:.4g} tokens: {cost['days']:.3g} days, {cost['gpu_hours']:,.0f} GPU hours"
        + ("" if cost["total"] is None else f", {cost['total']:,.0f} at {cost['price_per_gpu_hour']:g} a GPU hour"),
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    return "\n".join([*lines, "left out or assumed:", *(f"  - {note}" for note in values["left_out"])])


def layouts_table(layouts: list[Layout], gpus: int, shown: int) -> str:
    """Proposals as lines: tokens per second, peak, what to type."""
    lines = [f"{len(layouts)} layouts fit {gpus} GPUs, the fastest first" + (f" ({shown} shown)" if shown < len(layouts) else "")]
    for layout in layouts[:shown]:
        words = " ".join(layout.overrides) or "(as configured)"
        lines.append(f"{layout.step.tokens_per_second:>12,.0f} tokens/s  {_gib(layout.memory.peak):>10}  {words}")
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
