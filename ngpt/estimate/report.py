"""What `ngpt estimate` prints: one JSON object, or the same as a table."""

import math
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.config.executor import expected_executor
from ngpt.config.experts import recipes_of_experts
from ngpt.config.layers import LAYERS
from ngpt.config.linears import recipes_in_use
from ngpt.config.megatron_arguments import passed_on
from ngpt.config.schema import Config
from ngpt.config.sizes import data_parallel_size, padded_vocab_size, world_size
from ngpt.durations import duration
from ngpt.estimate.calibration import LINK_FRACTION, LOW_PRECISION_GEMM_FRACTION, RESERVED, STEP_BAND
from ngpt.estimate.counts import count_parameters, layer_flops, training_flops_per_token
from ngpt.estimate.layouts import Layout, Proposals, fits, usable_memory
from ngpt.estimate.memory import MemoryEstimate, estimate_memory
from ngpt.estimate.rank import ASSUMED_GPU, chunks_by_rank, gpu_of, has_grouped_experts
from ngpt.estimate.states import rank_parameters
from ngpt.estimate.step_time import StepTime, estimate_step
from ngpt.shell import in_shell

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
        "left_out": left_out(cfg, step),
    }


def describe_proposals(found: Proposals, shown: int) -> dict[str, Any]:
    """What `--fit --json` adds: proposals, or the reasons why there are none."""
    return {
        "fit_gpus": found.gpus,
        "layouts": [_layout(layout) for layout in found.layouts[:shown]],
        "rejected": dict(found.rejected),
        "nearest": found.nearest and _layout(found.nearest),
    }


def _layout(layout: Layout) -> dict[str, Any]:
    return {
        "overrides": list(layout.overrides),
        "peak_bytes": round(layout.memory.peak),
        "step_s": layout.step.total,
        "tokens_per_second": layout.step.tokens_per_second,
    }


def _parameters(cfg: Config) -> dict[str, Any]:
    counts = count_parameters(cfg.model)
    ends = {"embedding": counts.embedding, "head": counts.head}
    layers = {LAYERS[symbol].name: count for symbol, count in counts.layers.items()}
    others = {name: getattr(counts, name) for name in ("prediction", "logit_scale", "final_norm")}
    return {
        "parameters_total": counts.total,
        "parameters_active": counts.active,
        "parameters": ends | layers | others,
        "parameters_per_rank": [rank_parameters(cfg, held).total for held in chunks_by_rank(cfg)],
    }


def _flops(cfg: Config) -> dict[str, int]:
    """Forward and backward of one token, without recomputed work."""
    total = training_flops_per_token(cfg.model, cfg.train.seq_length)
    scan = layer_flops(cfg.model, "M", cfg.train.seq_length)
    matrices = 6 * count_parameters(cfg.model).matmul
    return {"total": total, "matrices": matrices, "attention": total - scan - matrices, "mamba_scan": scan}


def _memory(memory: MemoryEstimate) -> dict[str, Any]:
    sizes = {
        "weights": memory.states.weights,
        "gradients": memory.states.gradients,
        "optimizer": memory.states.optimizer,
        "quantized_weights": memory.quantized_weights,
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


def left_out(cfg: Config, step: StepTime) -> list[str]:
    """What the estimates of this config do not see, or take for granted."""
    notes = [
        f"memory beside torch's allocations: CUDA context, NCCL buffers, fragmentation ({RESERVED / _GIB:.0f} GiB are kept free for them)",
        "evaluation, checkpoints, data loading, health panels, first steps and restarts",
    ]
    if cfg.cluster.gpu is None:
        notes.append(f"cluster.gpu is not set: {ASSUMED_GPU} is assumed")
    if (cfg.cluster.gpu or ASSUMED_GPU) not in ("h100", "h200"):
        notes.append("this GPU was not measured: it is assumed to reach the fractions of its peak rates that an H100 does")
    if world_size(cfg) > 1:
        notes.append(
            f"links: {LINK_FRACTION:.0%} of their rate, as two H200s reached in collectives; what overlaps, as in their trace"
        )
    if "E" in cfg.model.layer_pattern:
        notes.append("unbalanced routing: every expert is given equally many tokens")
    if step.stage.waiting:
        notes.append("how fast this host runs Python: taken as on the machines measured, which differed by 30% with the same GPU")
    low, high = STEP_BAND
    notes.append(f"steps of 1.2B and 1.5B models took {low:.2f} to {high:.2f} times their estimates on an H200")
    if "E" in cfg.model.layer_pattern and not has_grouped_experts(cfg):
        notes.append("experts run one by one: their host time was measured under emulation alone, on one host")
    elif "native" in {expected_executor(cfg, recipe) for recipe in recipes_of_experts(cfg)}:
        notes.append("native experts: their host time was measured in fp8 alone, on one host")
    if any(expected_executor(cfg, recipe) == "emulated" and not recipe.quantised_by_kernels for recipe in recipes_in_use(cfg)):
        notes.append("four over six has no kernel: quantised by the torch reference, which takes longer than is counted")
    native = {recipe.format for recipe in recipes_in_use(cfg) if expected_executor(cfg, recipe) == "native"}
    for format in sorted(native):
        notes.append(f"native {format} was not measured: {LOW_PRECISION_GEMM_FRACTION:.0%} of its rate is assumed")
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
    if theirs := passed_on(cfg.megatron):
        notes.append(f"megatron.*: {', '.join(sorted(theirs))}")
    return notes


def as_table(cfg: Config, values: dict[str, Any]) -> str:
    """The estimates as lines of text."""
    parallel, step, cost = cfg.parallel, values["step"], values["cost"]
    micro = step["micro_batch_s"]
    kinds = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in values["parameters"].items() if count)
    per_rank = values["parameters_per_rank"]
    ranks = f"{per_rank[0]:,}" if len(set(per_rank)) == 1 else ", ".join(f"{count:,}" for count in per_rank) + " (by pipeline rank)"
    layout = f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, context {parallel.context}, expert {parallel.expert}"
    layout += f", data {data_parallel_size(cfg)}, recompute {parallel.recompute}"
    rate = "BF16" if cfg.precision.dtype == "bf16" else "TF32"
    parts = {name.replace("_", " ").replace("elementwise", "element-wise"): micro[name] for name in micro if name != "total"}
    rows = {
        "run": f"{values['run']} on {values['gpus']} x {values['gpu']}: {layout}",
        "parameters": f"{values['parameters_total']:,}, {values['parameters_active']:,} active for a token",
        "  by kind": kinds,
        "  a rank": ranks,
        "FLOPs a token": ", ".join(
            f"{name.replace('_', ' ')} {_flop(count)}" for name, count in values["flops_per_token"].items() if count
        ),
        **_memory_rows(cfg, values["memory"]),
        "step": f"{_time(step['seconds'])}, {step['tokens_per_second']:,.0f} tokens/s, MFU {100 * step['mfu']:.3g}% of the {rate} rate",
        "  a micro-batch": f"{_time(micro['total'])} x {step['micro_batches']}"
        + (" (on the slowest pipeline rank)" if parallel.pipeline > 1 else "")
        + ": "
        + ", ".join(f"{name} {_time(seconds)}" for name, seconds in parts.items()),
        "  once": f"optimizer {_time(step['optimizer_s'])}, pipeline bubble {_time(step['bubble_s'])}, "
        f"gradients and weights on the way {_time(step['data_parallel_s'])}",
        "whole run": f"{cost['steps']:,} steps, {_count(cost['tokens'])} tokens: {duration(86400 * cost['days'])}, "
        f"{_count(cost['gpu_hours'])} GPU hours"
        + ("" if cost["total"] is None else f", {_count(cost['total'])} at {cost['price_per_gpu_hour']:g} a GPU hour"),
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    return "\n".join([*lines, "left out or assumed:", *(f"  - {note}" for note in values["left_out"])])


def _memory_rows(cfg: Config, memory: dict[str, Any]) -> dict[str, str]:
    rank = f" on pipeline rank {memory['pipeline_rank']}" if cfg.parallel.pipeline > 1 else ""
    reserved = f"{memory['reserved_bytes'] / _GIB:.0f} GiB for CUDA and NCCL"
    usable = f"{_bytes(usable_memory(cfg))} usable ({_bytes(memory['gpu_bytes'])} less {reserved})"
    return {
        "memory a rank": f"{_bytes(memory['peak_bytes'])} of {usable} at its peak, the {memory['peak_moment']}{rank}"
        + ("" if memory["fits"] else "; DOES NOT FIT"),
        "  states": f"weights {_bytes(memory['weights_bytes'])}, gradients {_bytes(memory['gradients_bytes'])}, "
        f"optimizer {_bytes(memory['optimizer_bytes'])}"
        + (f", quantised weights {_bytes(kept)}" if (kept := memory["quantized_weights_bytes"]) else ""),
        "  micro-batches": f"kept activations {_bytes(memory['activations_bytes'])}, {_bytes(memory['temporary_bytes'])} more at the peak "
        f"(vocabulary {padded_vocab_size(cfg.model):,}), workspace {_bytes(memory['workspace_bytes'])}",
    }


def proposals_table(found: Proposals, shown: int, refused: ConfigError | None = None) -> str:
    """Proposals as lines: tokens per second, peak, what to type. If there are none, the reasons.

    Args:
        refused: what the checks say against the configured layout.
    """
    number = len(found.layouts)
    title = f"{number} layout{'s' * (number != 1)} fit{'s' * (number == 1)} {found.gpus} GPU{'s' * (found.gpus != 1)}"
    lines = [title + (", the fastest first" if number > 1 else "") + (f" ({shown} shown)" if shown < number else "")]
    if refused:
        lines.append(f"  the configured one is refused: {'; '.join(str(refused).splitlines())}")
    if not found.layouts:
        lines += _why_none(found)
    for layout in found.layouts[:shown]:
        words = in_shell(*layout.overrides) or "(as configured)"
        lines.append(f"{layout.step.tokens_per_second:>12,.0f} tokens/s  {_bytes(layout.memory.peak):>10}  {words}")
    return "\n".join(lines)


_REASONS = {
    "layers": "with more pipeline stages than layers",
    "batch": "in which train.global_batch_size does not divide over the data-parallel ranks",
    "checks": "refused by the checks of the config",
    "memory": "too large",
}


def _why_none(found: Proposals) -> list[str]:
    """How many layouts were dropped for each reason, how close the smallest one came, and what to change."""
    counts = ", ".join(f"{found.rejected[reason]} {words}" for reason, words in _REASONS.items() if found.rejected[reason])
    lines = [f"  {found.rejected.total()} tried: {counts}"]
    if found.refusals:
        lines.append(f"  the checks, most often: {found.refusals.most_common(1)[0][0]}")
    if found.nearest:
        words = in_shell(*found.nearest.overrides) or "(as configured)"
        usable = f"{_bytes(usable_memory(found.base))} usable"
        lines.append(f"  the smallest peak: {_bytes(found.nearest.memory.peak)} of {usable}, with {words}")
        more = found.gpus * 2 ** math.ceil(math.log2(found.nearest.memory.peak / usable_memory(found.base)))
        lines.append(f"Give more GPUs (--fit {more}), GPUs with more memory (cluster.gpu), or a shorter train.seq_length")
    elif found.rejected["batch"]:
        lines.append(f"Set train.global_batch_size to a multiple of {found.gpus}, or give fewer GPUs")
    else:
        lines.append("Change what the checks name, or the number of GPUs")
    return lines


def _bytes(size: float) -> str:
    return _scaled(size, {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}, 2)


def _flop(count: float) -> str:
    return _scaled(count, {"GFLOP": 1e9, "MFLOP": 1e6, "kFLOP": 1e3}, 3)


def _time(seconds: float) -> str:
    if seconds < 1:
        return _scaled(seconds, {"ms": 1e-3, "us": 1e-6, "ns": 1e-9}, 1)
    return f"{seconds:,.{2 - (seconds >= 10) - (seconds >= 100)}f} s"


def _scaled(size: float, units: dict[str, float], digits: int) -> str:
    """A size in the largest unit in which it is at least a tenth, else in the smallest. Zero is in the largest."""
    unit = next((unit for unit, one in units.items() if size >= 0.1 * one or size == 0), list(units)[-1])
    return f"{size / units[unit]:.{digits}f} {unit}" if size else f"0 {unit}"


def _count(number: float) -> str:
    if number >= 1e7:
        return f"{number:.4g}"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
