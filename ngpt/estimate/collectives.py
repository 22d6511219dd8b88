"""Seconds of one collective: bytes over the slowest link of its group, in Megatron's order of ranks.

Ranks are numbered tensor first, then context, data and pipeline (experts: expert tensor, expert, data, pipeline), so that a group of
`size` ranks with stride `stride` lies in one NVLink domain where size * stride does not exceed it.
"""

from ngpt.config.schema import Config
from ngpt.estimate.calibration import COLLECTIVE_LATENCY_S, LINK_FRACTION
from ngpt.estimate.rank import gpu_of


def nvlink_domain(cfg: Config) -> int:
    """GPUs that NVLink connects: a host, or several where the GPU's domain spans hosts."""
    domain = gpu_of(cfg).nvlink_domain
    return domain if domain > 8 else min(domain, cfg.cluster.gpus_per_node)


def gather_seconds(cfg: Config, whole: float, size: int, stride: int = 1) -> float:
    """An all-gather or a reduce-scatter of `whole` bytes over a group; an all-reduce takes two."""
    if size == 1:
        return 0.0
    gpu, inside = gpu_of(cfg), max(nvlink_domain(cfg) // stride, 1)
    rate = gpu.nvlink if size <= inside else min(gpu.nvlink, gpu.network * inside)  # a ring leaves a host through all its adapters
    return whole * (size - 1) / size / (rate * LINK_FRACTION) + COLLECTIVE_LATENCY_S


def exchange_seconds(cfg: Config, sent: float, size: int, stride: int = 1) -> float:
    """An all-to-all in which every rank has `sent` bytes, its own part among them."""
    if size == 1:
        return 0.0
    gpu, inside = gpu_of(cfg), min(size, max(nvlink_domain(cfg) // stride, 1))
    near, far = sent * (inside - 1) / size, sent * (size - inside) / size
    return max(near / gpu.nvlink, far / gpu.network) / LINK_FRACTION + COLLECTIVE_LATENCY_S
