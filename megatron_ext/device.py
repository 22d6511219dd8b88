"""Whether this process computes on a GPU. `torch.cuda.is_available()` cannot tell: the CPU compatibility module makes it true."""

import torch


def on_gpu() -> bool:
    """True on a CUDA device, False on the CPU behind `megatron_ext.compat.cuda_on_cpu` (which answers capability 0.0)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] > 0


def capturing() -> bool:
    """Whether what is launched now becomes part of a CUDA graph: the host cannot ask for results then."""
    return on_gpu() and torch.cuda.is_current_stream_capturing()
