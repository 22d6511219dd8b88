"""The highest rate that a model could reach on a GPU, given the formats of its products: the denominator of MFU. Needs no torch."""

from collections.abc import Mapping

from ngpt.config.linears import BlockLinear, block_linears, recipe_by_linear
from ngpt.config.schema import Config
from ngpt.estimate.counts import training_flops_per_token
from ngpt.estimate.hardware import peak_flops
from ngpt.recipes import Recipe


def product_peaks(cfg: Config, gpu: str | None, dtype: str, executors: Mapping[Recipe, str]) -> tuple[float, float] | None:
    """FLOP/s of one GPU with every product at the peak of the format it executes in.

    Args:
        gpu: Name in the table of hardware; None: unknown.
        dtype: Of the products in high precision: bf16, tf32 or fp32.
        executors: What runs each recipe, and so whether it multiplies in its format. Emulation multiplies quantised operands in BF16.

    Returns:
        (while low precision is on, in the tail of the run without it): the harmonic mean of the peaks over the FLOPs of a token. None
        where the GPU is unknown or has no such rate.
    """
    high, recipes = peak_flops(gpu, dtype), recipe_by_linear(cfg)
    native: dict[str, int] = {}  # FLOPs of a token by format
    for linear in block_linears(cfg):
        if linear.name in recipes and executors[recipe := recipes[linear.name]] == "native":
            native[recipe.format] = native.get(recipe.format, 0) + _flops_per_token(linear, cfg)
    rates = {format: rate for format in native if (rate := peak_flops(gpu, format)) is not None}
    if high is None or len(rates) < len(native):
        return None
    total = training_flops_per_token(cfg.model, cfg.train.seq_length)
    seconds = (total - sum(native.values())) / high + sum(flops / rates[format] for format, flops in native.items())
    return total / seconds, high


def _flops_per_token(linear: BlockLinear, cfg: Config) -> int:
    """FLOPs of one linear's three products over all tensor-parallel ranks. Routed experts count once for each expert of a token."""
    weights = linear.in_features * linear.inputs.shards * linear.out_features * linear.outputs.shards
    return 6 * weights * (cfg.model.moe_top_k if linear.is_routed else 1)
