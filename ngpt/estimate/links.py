"""Seconds of the collectives between ranks: bytes over the slowest link of the group, after Megatron's order of ranks.

Ranks are numbered tensor first, then context, data and pipeline (experts: expert tensor, expert, data, pipeline), so that a group of
`size` ranks with stride `stride` lies in one NVLink domain where size * stride does not exceed it.
"""

from ngpt.config.schema import Config
from ngpt.config.sizes import data_parallel_size, expert_tensor_size
from ngpt.estimate.calibration import COLLECTIVE_LATENCY_S, LINK_FRACTION
from ngpt.estimate.layout import (
    Layer,
    Tokens,
    activation_bytes,
    computes_norm,
    dense_data_parallel_size,
    expert_data_parallel_size,
    gpu_of,
)
from ngpt.estimate.states import RankParameters


def nvlink_domain(cfg: Config) -> int:
    """GPUs that NVLink connects: a host, or several where the GPU's domain spans hosts."""
    domain = gpu_of(cfg).nvlink_domain
    return domain if domain > 8 else min(domain, cfg.cluster.gpus_per_node)


def gather_seconds(cfg: Config, whole: float, size: int, stride: int = 1) -> float:
    """An all-gather or a reduce-scatter of `whole` bytes over a group; an all-reduce takes two."""
    if size == 1:
        return 0.0
    gpu, inside = gpu_of(cfg), max(nvlink_domain(cfg) // stride, 1)
    rate = gpu.nvlink if size <= inside else min(gpu.nvlink, gpu.network * inside)  # a ring leaves a host by all its adapters
    return whole * (size - 1) / size / (rate * LINK_FRACTION) + COLLECTIVE_LATENCY_S


def exchange_seconds(cfg: Config, sent: float, size: int, stride: int = 1) -> float:
    """An all-to-all in which every rank has `sent` bytes, its own part among them."""
    if size == 1:
        return 0.0
    gpu, inside = gpu_of(cfg), min(size, max(nvlink_domain(cfg) // stride, 1))
    near, far = sent * (inside - 1) / size, sent * (size - inside) / size
    return max(near / gpu.nvlink, far / gpu.network) / LINK_FRACTION + COLLECTIVE_LATENCY_S


def layer_links(cfg: Config, layer: Layer, tokens: Tokens) -> tuple[float, float]:
    """Exposed seconds of one layer's tensor, context and expert parallel collectives, forward and backward."""
    parallel, size, hidden = cfg.parallel, activation_bytes(cfg), cfg.model.hidden_size
    # Gather in front and reduce-scatter behind the sub-block, or one all-reduce. Backward the gather of the output's gradient alone is
    # exposed: dgrad hides the second gather of the input, wgrad the scatter of its gradient (traced: overlap_h200x2_2026-11-29). Without
    # sequence parallelism, which was not traced, the all-reduce counts whole.
    # Of an expert layer the shared expert alone is split so: routed tokens go through the dispatcher below.
    split = layer.symbol != "E" or layer.has_shared_experts
    forward = 2 * gather_seconds(cfg, tokens.inner * hidden * size, parallel.tensor) * split
    backward = forward / 2 if parallel.sequence_parallel else forward
    writers = (linear for linear in layer.linears if not linear.reads_stream)
    if parallel.tensor > 1 and any(computes_norm(cfg, layer, writer) for writer in writers):
        forward, backward = forward + 2 * COLLECTIVE_LATENCY_S, backward + 2 * COLLECTIVE_LATENCY_S  # one number a token
    if layer.symbol == "E":
        stride = expert_tensor_size(cfg)
        sent = tokens.stream * cfg.model.moe_top_k * hidden * size
        spread = exchange_seconds(cfg, sent, parallel.expert, stride)
        if cfg.parallel.token_dispatcher == "allgather":
            spread = gather_seconds(cfg, tokens.stream * hidden * size * parallel.expert, parallel.expert, stride)
        within = gather_seconds(cfg, tokens.routed * hidden * size, stride)
        forward, backward = forward + 2 * (spread + within), backward + 2 * (spread + within)
    if parallel.context > 1 and layer.symbol == "*":
        keys = layer.linear("linear_qkv").out_features - layer.linear("linear_proj").in_features
        ring = gather_seconds(cfg, tokens.inner * parallel.context * keys * size, parallel.context, parallel.tensor)
        forward, backward = forward + ring, backward + 2 * ring
    if parallel.context > 1 and layer.symbol == "M":
        numbers = layer.linear("in_proj").out_features + layer.linear("out_proj").in_features
        swap = exchange_seconds(cfg, tokens.inner * numbers * size, parallel.context, parallel.tensor)
        forward, backward = forward + swap, backward + swap
    return forward, backward


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
