"""The recipe of a run: what `precision` in the config means for the three operands of a linear layer."""

from dataclasses import dataclass

from ngpt.config.schema import PrecisionConfig
from ngpt.precision.quantize import QuantizerSpec
from ngpt.precision.tensor import BLOCK, BlockShape

_BLOCK_SHAPES: dict[str, BlockShape] = {"1x16": (1, BLOCK), "16x16": (BLOCK, BLOCK)}


@dataclass(frozen=True)
class Recipe:
    """How the linear layers of the blocks compute.

    Attributes:
        name: of the option in conf/precision.
        dtype: "fp32" or "bf16": weights and activations, and the layers that the policy keeps out of `format`.
        format: "none", "fp8", "mxfp8" or "nvfp4".
        executor: "auto", "native" or "emulated"; only "auto" unless format is "nvfp4".
        input: of fprop (rowwise) and wgrad (columnwise); None unless format is "nvfp4", like the other two.
        weight: of fprop and dgrad.
        grad_output: of dgrad and wgrad.
        bf16_tail: the last part of the steps, 0 to 1, that computes in `dtype`.
    """

    name: str
    dtype: str
    format: str
    executor: str
    input: QuantizerSpec | None
    weight: QuantizerSpec | None
    grad_output: QuantizerSpec | None
    bf16_tail: float

    def describe(self) -> str:
        """One or two lines for the run header."""
        if self.format == "none":
            return f"{self.name}: every layer in {self.dtype}"
        line = f"{self.name}: {self.format} operands in the linear layers of the blocks, {self.dtype} elsewhere"
        if self.bf16_tail:
            line += f", {self.dtype} everywhere in the last {self.bf16_tail:.4g} of the steps"
        if self.format != "nvfp4":
            return line
        operands = {"input": self.input, "weight": self.weight, "grad_output": self.grad_output}
        return f"{line}\n" + "; ".join(f"{name} {_describe(spec)}" for name, spec in operands.items())


def recipe_of(precision: PrecisionConfig) -> Recipe:
    """The recipe that a checked `precision` section asks for.

    The Hadamard transform goes to both operands of wgrad (columnwise input and grad_output), where it cancels; never to the weight.
    """
    options = {key: getattr(precision, key) for key in ("name", "dtype", "format", "executor", "bf16_tail")}
    if precision.format != "nvfp4":
        return Recipe(**options, input=None, weight=None, grad_output=None)
    rht = "signed" if precision.rht else "off"
    return Recipe(
        **options,
        input=QuantizerSpec(global_amax=precision.input_amax, rht=rht),
        weight=QuantizerSpec(global_amax=precision.weight_amax, block_shape=_BLOCK_SHAPES[precision.weight_blocks]),
        grad_output=QuantizerSpec(
            global_amax=precision.grad_output_amax,
            static_amax=precision.static_grad_amax,
            rht=rht,
            rounding="sr" if precision.stochastic_rounding else "rtne",
        ),
    )


def _describe(spec: QuantizerSpec) -> str:
    amax = f"static amax {spec.static_amax:.6g}" if spec.global_amax == "static" else f"{spec.global_amax} amax"
    height, width = spec.block_shape
    return f"{amax}, {height}x{width}, {spec.rounding}" + (", RHT columnwise" if spec.rht != "off" else "")
