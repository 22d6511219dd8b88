"""The rate a model could reach at most on a GPU, by the formats its products execute in: the denominator of MFU. Needs no torch."""

from ngpt.config.linears import BlockLinear, quantized_linears
from ngpt.config.schema import Config
from ngpt.estimate.counts import training_flops_per_token
from ngpt.estimate.hardware import peak_flops


def product_peaks(cfg: Config, gpu: str | None, dtype: str, native: bool) -> tuple[float, float] | None:
    """FLOP/s of one GPU with every product at the peak of the format it executes in.

    Args:
        gpu: Name in the table of hardware; None: unknown.
        dtype: In which the products of high precision multiply: bf16, tf32 or fp32.
        native: Whether the quantised linears multiply in precision.format. Emulation multiplies what it has quantised in BF16.

    Returns:
        (while low precision is on, in the tail of the run without it): the harmonic mean of the peaks over the FLOPs of a token. None
        where the GPU is unknown or has no such rate.
    """
    high, low = peak_flops(gpu, dtype), peak_flops(gpu, cfg.precision.format if native else dtype)
    if high is None or low is None:
        return None
    total = training_flops_per_token(cfg.model, cfg.train.seq_length)
    quantized = sum(_flops_per_token(linear, cfg) for linear in quantized_linears(cfg)) if native else 0
    return total / (quantized / low + (total - quantized) / high), high


def _flops_per_token(linear: BlockLinear, cfg: Config) -> int:
    """Of one linear's three products, over all tensor-parallel ranks; routed experts run as often as a token has experts."""
    weights = linear.in_features * linear.inputs.shards * linear.out_features * linear.outputs.shards
    return 6 * weights * (cfg.model.moe_top_k if ".experts." in linear.name else 1)
