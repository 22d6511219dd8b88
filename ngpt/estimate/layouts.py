"""`ngpt estimate --fit`: parallel layouts of a config that a number of GPUs can hold, the fastest first."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from ngpt.config.checks import transformer_engine_attention, validate
from ngpt.config.errors import ConfigError
from ngpt.config.layers import LAYERS
from ngpt.config.pattern import parse, without_cuts
from ngpt.config.schema import Config, ParallelConfig
from ngpt.config.sizes import world_size
from ngpt.estimate.calibration import RESERVED
from ngpt.estimate.collectives import nvlink_domain
from ngpt.estimate.kernels import embedding_work, layer_work, output_work
from ngpt.estimate.memory import MemoryEstimate, estimate_memory
from ngpt.estimate.rank import chunks, gpu_of, tokens
from ngpt.estimate.step_time import StepTime, estimate_step

_POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
_MICRO_BATCHES = (1, 2, 3, 4, 8)
_LARGEST_TENSOR = 8  # beyond it a layer's products are too narrow
_LARGEST_PIPELINE = 16
_CONTEXT_TOKENS = 8192  # fewest tokens of a sequence on a rank: a second way to cut a sequence only helps where the first runs out
_USUAL_HOST = 8  # GPUs, where cluster.gpus_per_node says nothing (1)

LIMITS = (
    f"--fit tries powers of two: tensor up to {_LARGEST_TENSOR}; pipeline up to {_LARGEST_PIPELINE}, with one or two chunks a rank; "
    f"context up to {_POWERS[-1]} where it leaves a rank {_CONTEXT_TOKENS} tokens of a sequence; tensor * context within an NVLink domain; "
    f"expert up to {_POWERS[-1]}, expert_tensor 1 or as tensor; micro-batches of {', '.join(map(str, _MICRO_BATCHES))} and the configured "
    "one; the least recomputation that fits: none, mlp and moe, full. Batch, sequence length, precision and overlaps stay as configured."
)


@dataclass(frozen=True)
class Layout:
    """A config that passes all checks, with its estimates.

    Attributes:
        overrides: command-line words that lead to it, not quoted for a shell.
    """

    cfg: Config
    overrides: tuple[str, ...]
    memory: MemoryEstimate
    step: StepTime


@dataclass
class Proposals:
    """What a search found.

    Attributes:
        base: the config on the GPUs that were searched for.
        layouts: those that fit, the fastest first.
        rejected: ways to cut the model that were dropped, by reason: layers, batch, checks, memory.
        refusals: what the checks said about them.
        nearest: where none fits, the one with the smallest peak of those that pass the checks.
    """

    base: Config
    layouts: list[Layout] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    nearest: Layout | None = None

    @property
    def gpus(self) -> int:
        return world_size(self.base)


@dataclass(frozen=True)
class _Sized:
    cfg: Config
    memory: MemoryEstimate

    @property
    def fits(self) -> bool:
        return fits(self.cfg, self.memory)


def usable_memory(cfg: Config) -> float:
    """Bytes of a GPU that a rank's peak may take: what torch does not allocate has to fit beside it."""
    return gpu_of(cfg).memory - RESERVED


def fits(cfg: Config, memory: MemoryEstimate) -> bool:
    """Whether a rank's peak leaves room for what torch does not allocate."""
    return memory.peak <= usable_memory(cfg)


def propose_layouts(cfg: Config, gpus: int | None = None, replaced: Collection[str] = ()) -> Proposals:
    """All layouts that fit, by estimated step time, each with its fastest micro-batch and the least recomputation that makes it fit.

    Args:
        cfg: a checked config; its global batch, sequence length, precision and overlaps stay.
        gpus: processes to lay out; None: those of the config's cluster.
        replaced: keys that no longer have their configured value: every proposal states them.

    Raises:
        ConfigError: the GPUs do not fill whole hosts.
    """
    found = Proposals(_on_cluster(cfg, world_size(cfg) if gpus is None else gpus))
    nearest: _Sized | None = None
    cuts = list(_cuts(found.base))
    patterns = {stages: balanced_cut(found.base, stages) for stages in {_stages(parallel) for parallel in cuts}}
    for parallel in cuts:
        candidates = _candidates(found, parallel, patterns[_stages(parallel)])
        if not candidates:
            continue
        sized, step = _fastest(candidates)
        if step:
            found.layouts.append(Layout(sized.cfg, _overrides(cfg, sized.cfg, replaced), sized.memory, step))
            continue
        found.rejected["memory"] += 1
        if nearest is None or sized.memory.peak < nearest.memory.peak:
            nearest = sized
    found.layouts.sort(key=lambda layout: (layout.step.total, layout.memory.peak))
    if nearest and not found.layouts:
        found.nearest = Layout(nearest.cfg, _overrides(cfg, nearest.cfg, replaced), nearest.memory, estimate_step(nearest.cfg))
    return found


def _on_cluster(cfg: Config, gpus: int) -> Config:
    """The config on this many GPUs, in hosts of `cluster.gpus_per_node`."""
    if gpus < 1:
        raise ConfigError("--fit", gpus, "Must be a number of GPUs", "Give 1 or more")
    host = cfg.cluster.gpus_per_node if cfg.cluster.gpus_per_node > 1 else _USUAL_HOST
    host = min(host, gpus)
    if gpus % host:
        way_out = f"Give a multiple of {host}, or set cluster.gpus_per_node to a divisor of {gpus}"
        raise ConfigError("--fit", gpus, f"Must be whole hosts of {host} GPUs", way_out)
    return replace(cfg, cluster=replace(cfg.cluster, nodes=gpus // host, gpus_per_node=host))


def _cuts(base: Config) -> Iterator[ParallelConfig]:
    """Ways to cut the model over the ranks, without recomputation."""
    world, model = world_size(base), base.model
    powers = [size for size in _POWERS if world % size == 0]
    experts = [size for size in powers if model.num_experts % size == 0] if "E" in model.layer_pattern else [1]
    contexts = [size for size in powers if size == 1 or base.train.seq_length // size >= _CONTEXT_TOKENS]
    pipelines = [size for size in powers if size <= _LARGEST_PIPELINE]
    for tensor, pipeline, context, expert in product(powers, pipelines, contexts, experts):
        if tensor > _LARGEST_TENSOR or tensor * context > nvlink_domain(base) or world % (tensor * pipeline * context):
            continue
        expert_tensors = (1, None) if tensor > 1 and "E" in model.layer_pattern else (None,)
        for expert_tensor, virtual in product(expert_tensors, (None, 2) if pipeline > 1 else (None,)):
            yield replace(
                base.parallel,
                tensor=tensor,
                pipeline=pipeline,
                context=context,
                expert=expert,
                expert_tensor=expert_tensor,
                virtual_pipeline=virtual,
                sequence_parallel=tensor > 1,
                recompute="none",
                recompute_modules=[],
            )


def _stages(parallel: ParallelConfig) -> int:
    return parallel.pipeline * (parallel.virtual_pipeline or 1)


def _candidates(found: Proposals, parallel: ParallelConfig, pattern: str) -> list[Config]:
    """A cut with each micro-batch that the checks accept, smallest first. If they accept none, the reason is counted."""
    base = found.base
    if _stages(parallel) > len(parse(base.model.layer_pattern).trunk):
        found.rejected["layers"] += 1
        return []
    copies = world_size(base) // (parallel.tensor * parallel.pipeline * parallel.context)
    sizes = [size for size in sorted({*_MICRO_BATCHES, base.train.micro_batch_size}) if base.train.global_batch_size % (size * copies) == 0]
    if not sizes:
        found.rejected["batch"] += 1
        return []
    model = replace(base.model, layer_pattern=pattern)
    candidates = [replace(base, model=model, parallel=parallel, train=replace(base.train, micro_batch_size=size)) for size in sizes]
    refusals = [_refusal(candidate) for candidate in candidates]
    if all(refusals):
        found.rejected["checks"] += 1
        found.refusals[refusals[0]] += 1
        return []
    return [candidate for candidate, refusal in zip(candidates, refusals, strict=True) if not refusal]


def _fastest(candidates: list[Config]) -> tuple[_Sized, StepTime | None]:
    """The fastest of several micro-batches, with its time. If none fits, the one with the smallest peak, without a time."""
    best: tuple[_Sized, StepTime] | None = None
    too_large: list[_Sized] = []
    for sized in map(_least_recomputed, candidates):
        if not sized.fits:
            too_large.append(sized)
            continue
        step = estimate_step(sized.cfg)
        if best and step.tokens_per_second < best[1].tokens_per_second:
            break  # larger ones recompute more
        best = sized, step
    return best or (min(too_large, key=lambda sized: sized.memory.peak), None)


def balanced_cut(cfg: Config, stages: int) -> str:
    """The layer pattern cut into `stages` parts so that the slowest is as fast as possible, embedding and output layer included.

    A dense pattern gets no cuts: it is divided evenly anyway.
    """
    pattern = without_cuts(cfg.model.layer_pattern)
    trunk, depths = parse(pattern).trunk, parse(pattern).depths
    if stages == 1 or stages > len(trunk) or trunk == "*-" * (len(trunk) // 2):
        return pattern
    alone = replace(
        cfg,
        model=replace(cfg.model, layer_pattern=pattern),
        parallel=replace(cfg.parallel, tensor=1, pipeline=1, virtual_pipeline=None, context=1, sequence_parallel=False),
    )
    sizes, whole = tokens(alone), chunks(alone)[0]
    works = {layer: layer_work(alone, layer, sizes) for layer in set(whole.layers)}
    ends = [embedding_work(alone, sizes), *[output_work(alone, sizes)] * (1 + whole.depths)]
    layers = [max(forward.gpu + backward.gpu, forward.host + backward.host) for forward, backward in map(works.__getitem__, whole.layers)]
    seconds, beyond = layers[: len(trunk)], layers[len(trunk) :]
    seconds[0] += sum(work.gpu for work in ends[0])
    seconds[-1] += sum(beyond) + sum(work.gpu for both in ends[1:] for work in both)
    cuts = _smallest_maximum(seconds, stages)
    parts = [trunk[first:last] for first, last in zip([0, *cuts], [*cuts, len(trunk)], strict=True)]
    return "/".join(["|".join(parts), *depths])


def _smallest_maximum(seconds: list[float], parts: int) -> list[int]:
    """Where to cut a list so that the largest sum of a part is smallest: the first index of every part but the first."""
    sums = [0.0]
    for second in seconds:
        sums.append(sums[-1] + second)
    best: list[tuple[float, list[int]]] = [(total, []) for total in sums]  # of the first n items in one part
    for part in range(1, parts):
        previous, best = best, [(float("inf"), [])] * len(sums)
        for end in range(part + 1, len(sums)):
            options = ((max(previous[start][0], sums[end] - sums[start]), start) for start in range(part, end))
            largest, start = min(options)
            best[end] = (largest, [*previous[start][1], start])
    return best[-1][1]


def _refusal(cfg: Config) -> str:
    """The first rule that a config breaks, by its checks; empty if there is none."""
    try:
        validate(cfg)
        check_for_gpus(cfg)
    except ConfigError as error:
        return str(error).splitlines()[0]
    return ""


def check_for_gpus(cfg: Config) -> None:
    """Refuses attention that Transformer Engine cannot run, which an estimate assumes unless the config says otherwise.

    Training would only find this out on the GPU.

    Raises:
        ConfigError: its attention cannot do what the config says.
    """
    if cfg.model.transformer_impl != "local":
        for error in transformer_engine_attention(cfg):
            raise error


def _least_recomputed(candidate: Config) -> _Sized:
    """The config with the least recomputation that makes it fit; if nothing does, with the smallest peak."""
    pattern = candidate.model.layer_pattern
    selective = [kind.whole for symbol, kind in LAYERS.items() if kind.whole and symbol in pattern]
    ways: list[dict[str, Any]] = [{"recompute": "selective", "recompute_modules": selective}] if selective else []
    ways.append({"recompute": "full", "recompute_method": "uniform", "recompute_num_layers": 1})
    best = _Sized(candidate, estimate_memory(candidate))
    for way in ways:
        if best.fits:
            break
        cfg = replace(candidate, parallel=replace(candidate.parallel, **way))
        sized = _Sized(cfg, estimate_memory(cfg))
        if sized.memory.peak < best.memory.peak and not _refusal(cfg):
            best = sized
    return best


def _overrides(original: Config, cfg: Config, replaced: Collection[str]) -> tuple[str, ...]:
    """The command-line words that turn one config into the other, and those of the keys that must be stated."""
    keys = [f"parallel.{name}" for name in vars(cfg.parallel) if name not in ("name", "sequence_parallel")]
    keys += ["train.micro_batch_size", "model.layer_pattern", "cluster.nodes", "cluster.gpus_per_node"]
    words = []
    for key in keys:
        section, name = key.split(".")
        before, after = getattr(getattr(original, section), name), getattr(getattr(cfg, section), name)
        if before != after or key in replaced:
            words.append(f"{key}={_word(after)}" if key != "model.layer_pattern" else f'{key}="{after}"')
    # Null follows parallel.tensor. It is stated unless the config may already say it.
    split, cut = original.parallel.sequence_parallel, original.parallel.tensor > 1
    if "parallel.sequence_parallel" in replaced or (split != cfg.parallel.sequence_parallel and cut):
        words.append("parallel.sequence_parallel=null")
    return tuple(words)


def _word(value: object) -> str:
    if value is None:
        return "null"
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
