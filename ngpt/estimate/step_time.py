"""Seconds of a training step: the slowest pipeline stage's kernels or their launches, links that nothing hides, bubble, optimizer."""

from dataclasses import dataclass

from ngpt.config.layers import LAYERS
from ngpt.config.schema import Config
from ngpt.config.sizes import micro_batches_per_step, tokens_per_step, world_size
from ngpt.estimate.kernels import Work, embedding_work, join_work, layer_work, optimizer_work, output_work
from ngpt.estimate.links import data_parallel_seconds, layer_links, pipeline_seconds
from ngpt.estimate.rank import Chunk, Layer, Tokens, chunks_by_rank, dense_data_parallel_size, expert_data_parallel_size, tokens
from ngpt.estimate.states import RankParameters, rank_parameters

_SECONDS_AN_HOUR = 3600


@dataclass(frozen=True)
class StageTime:
    """One micro-batch on one pipeline stage, in seconds.

    Attributes:
        work: GPU seconds by kind and host seconds, both ways.
        links: exposed communication.
        waiting: time that the GPU waits for the host's launches.
        forward, backward: the whole time of each pass.
    """

    work: Work
    links: float
    waiting: float
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class StepTime:
    """One step, in seconds.

    Attributes:
        stage: the slowest stage.
        micro_batches: number in the step.
        bubble: pipeline ranks waiting for the first and last micro-batches.
        data_parallel: exposed communication of gradients and weights.
        optimizer: the optimizer step.
        tokens: number in the step. processes: GPUs.
    """

    stage: StageTime
    micro_batches: int
    bubble: float
    data_parallel: float
    optimizer: float
    tokens: int
    processes: int

    @property
    def total(self) -> float:
        return self.micro_batches * self.stage.total + self.bubble + self.data_parallel + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total

    def gpu_hours(self, steps: int) -> float:
        """GPU hours of this many steps."""
        return steps * self.total * self.processes / _SECONDS_AN_HOUR


def estimate_step(cfg: Config) -> StepTime:
    """The time of a step of a checked config."""
    sizes, ranks, by_rank = tokens(cfg), cfg.parallel.pipeline, chunks_by_rank(cfg)
    stages = [_stage_time(cfg, held, sizes) for held in by_rank]
    parameters = [rank_parameters(cfg, held) for held in by_rank]
    slowest = max(stages, key=lambda stage: stage.total)
    reduce, gather = (max(seconds) for seconds in zip(*(data_parallel_seconds(cfg, held) for held in parameters), strict=True))
    if cfg.parallel.overlap_grad_reduce:  # hidden by the last backward pass
        reduce = max(reduce - slowest.backward, 0.0)
    if cfg.parallel.overlap_param_gather:  # hidden by the first forward pass
        gather = max(gather - slowest.forward, 0.0)
    return StepTime(
        stage=slowest,
        micro_batches=micro_batches_per_step(cfg),
        bubble=(ranks - 1) / (cfg.parallel.virtual_pipeline or 1) * slowest.total,
        data_parallel=reduce + gather,
        optimizer=max(_optimizer_seconds(cfg, held) for held in parameters),
        tokens=tokens_per_step(cfg),
        processes=world_size(cfg),
    )


def _stage_time(cfg: Config, held: list[Chunk], sizes: Tokens) -> StageTime:
    """One micro-batch through all chunks of a rank."""
    forward: list[Work] = []
    backward: list[Work] = []
    links_forward = links_backward = 0.0
    kinds = {layer for chunk in held for layer in chunk.layers}
    works = {layer: layer_work(cfg, layer, sizes) for layer in kinds}
    links = {layer: layer_links(cfg, layer, sizes) for layer in kinds}
    for chunk in held:
        passes = [works[layer] for layer in chunk.layers]
        looked_up = chunk.first + chunk.depths
        passes += [embedding_work(cfg, sizes)] * looked_up + [output_work(cfg, sizes)] * (chunk.last + chunk.depths)
        passes += [join_work(cfg, sizes)] * chunk.depths
        again = recomputed_layers(cfg, chunk)
        forward += [one for one, _ in passes]
        backward += [other for _, other in passes] + [works[layer][0] for layer in again]
        backward += [Work(attention=works[layer][0].attention) for layer in recomputed_attention(cfg, chunk)]
        links_forward += sum(links[layer][0] for layer in chunk.layers)
        links_backward += sum(links[layer][1] for layer in chunk.layers) + sum(links[layer][0] for layer in again)
        boundaries = (not chunk.first) + (not chunk.last)
        links_forward += boundaries / 2 * pipeline_seconds(cfg, sizes)
        links_backward += boundaries / 2 * pipeline_seconds(cfg, sizes)
    whole_forward, whole_backward = _sum(forward), _sum(backward)
    work = whole_forward + whole_backward
    if any(layer.has_experts for chunk in held for layer in chunk.layers):
        # An expert layer's forward pass waits for the number of tokens of each expert: the host cannot run ahead of it.
        wait_forward, wait_backward = sum(_wait(one) for one in forward), _wait(whole_backward)
    else:
        wait_forward, wait_backward = (_wait(work) * part.gpu / work.gpu for part in (whole_forward, whole_backward))
    return StageTime(
        work=work,
        links=links_forward + links_backward,
        waiting=wait_forward + wait_backward,
        forward=whole_forward.gpu + wait_forward + links_forward,
        backward=whole_backward.gpu + wait_backward + links_backward,
    )


def _wait(work: Work) -> float:
    """Seconds that the GPU waits for its launches."""
    return max(work.host - work.gpu, 0.0)


def recomputed_layers(cfg: Config, chunk: Chunk) -> list[Layer]:
    """The layers that run forward again in the backward pass, with all they send. For attention alone see `recomputed_attention`."""
    parallel = cfg.parallel
    if parallel.recompute == "full":
        number = parallel.recompute_num_layers if parallel.recompute_method == "block" else len(chunk.layers)
        return list(chunk.layers[:number])
    return [layer for layer in chunk.layers if LAYERS[layer.symbol].whole in parallel.recompute_modules]


def recomputed_attention(cfg: Config, chunk: Chunk) -> list[Layer]:
    """The layers whose attention products run again in the backward pass."""
    modules = cfg.parallel.recompute_modules or ["core_attn"]
    if cfg.parallel.recompute != "selective" or "core_attn" not in modules:
        return []
    return [layer for layer in chunk.layers if "core_attn" in LAYERS[layer.symbol].parts]


def _optimizer_seconds(cfg: Config, held: RankParameters) -> float:
    shards = (dense_data_parallel_size(cfg), expert_data_parallel_size(cfg)) if cfg.parallel.distributed_optimizer else (1, 1)
    updated = (held.dense + held.dense_scales) / shards[0] + (held.experts + held.expert_scales) / shards[1]
    work = optimizer_work(cfg, updated, held.total, held.tensors)
    return max(work.gpu, work.host)


def _sum(works: list[Work]) -> Work:
    return sum(works, Work())
