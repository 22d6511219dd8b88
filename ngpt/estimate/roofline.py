"""Seconds of single pieces of work on one GPU: a roofline of each product, and bytes over bandwidth for the rest."""

from dataclasses import dataclass

from ngpt.config.executor import expected_executor
from ngpt.config.schema import Config
from ngpt.estimate import calibration as measured
from ngpt.estimate.rank import activation_bytes, gpu_of, operand_bytes
from ngpt.recipes import Recipe


@dataclass(frozen=True)
class Work:
    """Seconds of one GPU by what it does, and of the host that launches it.

    Attributes:
        products: of linear layers and the output layer. attention: its two products and softmax. scan: Mamba's convolution and scan.
        elementwise: norms, residual steps, scales, activations, dispatch of tokens, quantisation. loss: cross entropy.
        host: launching all of them.
    """

    products: float = 0.0
    attention: float = 0.0
    scan: float = 0.0
    elementwise: float = 0.0
    loss: float = 0.0
    host: float = 0.0

    @property
    def gpu(self) -> float:
        return self.products + self.attention + self.scan + self.elementwise + self.loss

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def product(cfg: Config, rows: float, inputs: int, outputs: int, weight_gradient: bool, recipe: Recipe | None = None) -> float:
    """Seconds of one product of `rows` tokens: the larger of its FLOPs and its bytes.

    A weight gradient is added to the fp32 buffer: read and written.
    """
    gpu, size = gpu_of(cfg), float(activation_bytes(cfg))
    dtype, fraction = ("bf16" if cfg.precision.dtype == "bf16" else "tf32"), measured.GEMM_FRACTION
    if recipe is not None and expected_executor(cfg, recipe) == "native":
        dtype, fraction, size = recipe.format, measured.LOW_PRECISION_GEMM_FRACTION, operand_bytes(cfg, recipe)
    rate = gpu.rates[dtype] * fraction
    weight = inputs * outputs * (8 if weight_gradient else size)
    moved = size * rows * (inputs + outputs) + weight
    return max(2 * rows * inputs * outputs / rate, moved / copy_rate(cfg))


def move(cfg: Config, moved: float) -> float:
    """Seconds of kernels that read and write this many bytes."""
    return moved / (copy_rate(cfg) * measured.KERNEL_FRACTION)


def copy_rate(cfg: Config) -> float:
    return gpu_of(cfg).hbm * measured.COPY_FRACTION
