"""What multiplies the quantised linears. The one decision of it: for a run, for the rules of its config and for its estimate."""

from ngpt.config.schema import Config, PrecisionConfig
from ngpt.estimate.hardware import GPUS


def decide_executor(precision: PrecisionConfig, has_kernels: bool) -> str:
    """`none` (the format is none), `native` (Transformer Engine's kernels) or `emulated`, which only nvfp4 can be.

    Args:
        has_kernels: Transformer Engine can run the recipe where the model will be.
    """
    if precision.format == "none":
        return "none"
    if precision.format != "nvfp4":
        return "native"
    if precision.executor != "auto":
        return precision.executor
    return "native" if has_kernels else "emulated"


def expected_executor(cfg: Config) -> str:
    """`decide_executor` for the GPU that the config names, with Transformer Engine on it. An unnamed one has no NVFP4 kernels."""
    gpu = cfg.cluster.gpu
    return decide_executor(cfg.precision, gpu is not None and "nvfp4" in GPUS[gpu].rates and cfg.model.transformer_impl != "local")
