"""Parameters of one rank, and the bytes of weights, gradients and optimizer state that belong to them."""

from collections import Counter
from dataclasses import dataclass

from ngpt.config.schema import Config
from ngpt.config.sizes import padded_vocab_size
from ngpt.estimate.kinds import KINDS
from ngpt.estimate.rank import (
    Chunk,
    Layer,
    RankParameters,
    dense_data_parallel_size,
    expert_data_parallel_size,
    has_grouped_experts,
    local_experts,
)


def rank_parameters(cfg: Config, held: list[Chunk]) -> RankParameters:
    """Counts what a rank with these chunks holds; all ranks of a pipeline stage hold the same number."""
    return sum((chunk_parameters(cfg, chunk) for chunk in held), RankParameters())


def chunk_parameters(cfg: Config, chunk: Chunk) -> RankParameters:
    """Counts a rank's part of a chunk, embedding and output layer included where the chunk has them.

    A tied output layer on another rank than the embedding is a separate copy, which prediction depths there share.
    """
    total = sum((layer_parameters(cfg, layer) * number for layer, number in Counter(chunk.layers).items()), RankParameters())
    model, ngpt = cfg.model, cfg.model.architecture == "ngpt"
    rows = padded_vocab_size(model) // cfg.parallel.tensor
    table = RankParameters(dense=rows * model.hidden_size, tensors=1)
    if chunk.first:
        total += table
    for _ in range(chunk.depths):
        norms = 0 if ngpt else 3
        join = (2 * model.hidden_size + norms) * model.hidden_size
        total += RankParameters(dense=join, replicated=join, tensors=1 + norms)
    if chunk.depths and not chunk.first:  # the depths look tokens up in a copy of the embedding
        total += table
    if chunk.last:
        if not (model.tied_embeddings and (chunk.first or chunk.depths or cfg.parallel.pipeline == 1)):
            total += table
        if ngpt:
            total += RankParameters(dense_scales=rows, tensors=1)  # sz
        else:
            total += RankParameters(dense=model.hidden_size, replicated=model.hidden_size, tensors=1)  # the final norm
    return total


def layer_parameters(cfg: Config, layer: Layer) -> RankParameters:
    """Counts a rank's part of one layer: its linears, nGPT's alpha or the control's norm in front, and what its kind has of its own."""
    hidden, experts = cfg.model.hidden_size, local_experts(cfg)
    routed = [linear for linear in layer.linears if linear.is_routed]
    whole = [linear for linear in layer.linears if not linear.is_routed]
    linears = RankParameters(
        dense=sum(linear.in_features * linear.out_features for linear in whole),
        experts=experts * sum(linear.in_features * linear.out_features for linear in routed),
        tensors=len(whole) + (1 if has_grouped_experts(cfg) else experts) * len(routed),
    )
    if cfg.model.architecture == "ngpt":
        step = RankParameters(dense_scales=hidden, replicated=hidden, tensors=1)
    else:
        step = RankParameters(dense=hidden, replicated=hidden, tensors=1)
    return linears + step + KINDS[layer.symbol].parameters(cfg, layer)


@dataclass(frozen=True)
class StateBytes:
    """Bytes that a rank holds from the first step to the last."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def state_bytes(cfg: Config, parameters: RankParameters) -> StateBytes:
    """Weights in the model's dtype, the gradient buffer, and Adam's state with the fp32 masters of bf16 weights.

    The distributed optimizer shards Adam's state and masters over the data-parallel ranks (for experts: over those with the same experts).
    """
    bf16, sharded = cfg.precision.dtype == "bf16", cfg.parallel.distributed_optimizer
    weight = 2 if bf16 else 4
    gradient = 4 if not bf16 or cfg.precision.grad_reduce_in_fp32 else 2
    state = 12 if bf16 else 8
    groups = (
        (parameters.dense, parameters.dense_scales, dense_data_parallel_size(cfg)),
        (parameters.experts, parameters.expert_scales, expert_data_parallel_size(cfg)),
    )
    return StateBytes(
        weights=sum(weight * matrices + 4 * scales for matrices, scales, _ in groups),
        gradients=sum(gradient * matrices + 4 * scales for matrices, scales, _ in groups),
        optimizer=sum((state * matrices + 8 * scales) / (ranks if sharded else 1) for matrices, scales, ranks in groups),
    )
