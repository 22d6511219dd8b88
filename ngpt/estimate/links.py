"""Seconds of communication between ranks: around and in a layer, between pipeline stages, and of gradients and weights."""

from ngpt.config.schema import Config
from ngpt.config.sizes import data_parallel_size, expert_tensor_size
from ngpt.estimate.calibration import COLLECTIVE_LATENCY_S, LINK_FRACTION
from ngpt.estimate.collectives import gather_seconds, nvlink_domain
from ngpt.estimate.kinds import KINDS
from ngpt.estimate.rank import (
    Layer,
    RankParameters,
    Tokens,
    activation_bytes,
    computes_norm,
    dense_data_parallel_size,
    expert_data_parallel_size,
    gpu_of,
)


def layer_links(cfg: Config, layer: Layer, tokens: Tokens) -> tuple[float, float]:
    """Exposed seconds of one layer's tensor, context and expert parallel collectives, forward and backward."""
    parallel, size, hidden = cfg.parallel, activation_bytes(cfg), cfg.model.hidden_size
    # A gather before and a reduce-scatter after the sub-block, or one all-reduce. Backward, only the gather of the output's gradient is
    # exposed: dgrad hides the second gather of the input, wgrad the scatter of its gradient (traced: overlap_h200x2_2026-11-29). Without
    # sequence parallelism, which was not traced, the all-reduce counts whole.
    # In an expert layer only the shared expert is split this way. Routed tokens go through the dispatcher below.
    split = any(not linear.is_routed for linear in layer.linears)
    forward = 2 * gather_seconds(cfg, tokens.inner * hidden * size, parallel.tensor) * split
    backward = forward / 2 if parallel.sequence_parallel else forward
    writers = (linear for linear in layer.linears if not linear.reads_stream)
    if parallel.tensor > 1 and any(computes_norm(cfg, layer, writer) for writer in writers):
        forward, backward = forward + 2 * COLLECTIVE_LATENCY_S, backward + 2 * COLLECTIVE_LATENCY_S  # one number a token
    inside = KINDS[layer.symbol].links(cfg, layer, tokens)
    return forward + inside[0], backward + inside[1]


def pipeline_seconds(cfg: Config, tokens: Tokens) -> float:
    """Sending one micro-batch's hidden states to the next stage, one way."""
    if cfg.parallel.pipeline == 1:
        return 0.0
    gpu = gpu_of(cfg)
    between = cfg.parallel.tensor * cfg.parallel.context * data_parallel_size(cfg)
    rate = gpu.nvlink if between * 2 <= nvlink_domain(cfg) else gpu.network
    return tokens.stream * cfg.model.hidden_size * activation_bytes(cfg) / (rate * LINK_FRACTION) + COLLECTIVE_LATENCY_S


def data_parallel_seconds(cfg: Config, parameters: RankParameters) -> tuple[float, float]:
    """Reducing the gradients and gathering the updated weights of a rank, once a step.

    Returns:
        (gradients, weights): with the distributed optimizer a reduce-scatter and an all-gather, else one all-reduce.
    """
    gradient = 4 if cfg.precision.dtype != "bf16" or cfg.precision.grad_reduce_in_fp32 else 2
    weight, parallel = activation_bytes(cfg), cfg.parallel
    reduce = gather = 0.0
    groups = (
        (parameters.dense, parameters.dense_scales, dense_data_parallel_size(cfg), parallel.tensor),
        (parameters.experts, parameters.expert_scales, expert_data_parallel_size(cfg), expert_tensor_size(cfg) * parallel.expert),
    )
    for matrices, scales, ranks, stride in groups:
        if matrices + scales == 0:
            continue
        reduce += gather_seconds(cfg, gradient * matrices + 4 * scales, ranks, stride)
        once_more = weight * matrices + 4 * scales if parallel.distributed_optimizer else gradient * matrices + 4 * scales
        gather += gather_seconds(cfg, once_more, ranks, stride)
    return reduce, gather
