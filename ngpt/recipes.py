"""The one description of a recipe. The config's rules, the estimate, emulation, Transformer Engine, doctor and report all read it.

A linear layer has three operands, and each is quantised in two directions: rowwise (blocks along its features) and columnwise (blocks
along its rows). fprop multiplies input and weight rowwise, dgrad grad_output rowwise and weight columnwise, wgrad grad_output and input
columnwise. `ngpt.config.recipes` makes a recipe from a config. Imports no torch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

BLOCK = 16
BlockShape = tuple[int, int]
Direction = Literal["rowwise", "columnwise"]
GlobalAmax = Literal["dynamic", "dynamic_pow2", "static"]
Rounding = Literal["rtne", "sr"]
Rht = Literal["off", "signed", "unsigned"]

# With this amax the global encode scale 2688 / amax is exactly 2^11.
STATIC_AMAX = 1.3125
E4M3_BOUND = 448
DIRECTIONS: tuple[Direction, Direction] = ("rowwise", "columnwise")
OPERANDS = ("input", "weight", "grad_output")


@dataclass(frozen=True)
class FourOverSix:
    """Try each block with its largest value mapped to 6 and to 4, keep the better. `bound`: scale that the global amax maps to."""

    bound: Literal[256, 448] = 256
    error: Literal["MAE", "MSE"] = "MAE"

    def __post_init__(self) -> None:
        _check_choices(self, {"bound": (256, 448), "error": ("MAE", "MSE")})


@dataclass(frozen=True)
class QuantizerSpec:
    """How a tensor is quantised, the same in both directions but for the transform.

    Attributes:
        block_shape: (1, 16), or (16, 16) for weights: the same codes in both directions.
        global_amax: "dynamic": max |x|. "dynamic_pow2": rounded up so that the global encode scale is a power of two.
            "static": `static_amax`.
        static_amax: magnitude that saturates under "static"; the default makes the global encode scale 2^11.
        rht: random Hadamard transform of the columnwise direction; the rowwise direction never has one.
        rounding: "rtne" (nearest, ties to even) or "sr" (stochastic).
        four_over_six: the 4over6 option.
        row_scaled: one amax for each stored row instead of one for the tensor.

    Raises:
        ValueError: Options that exclude each other.
    """

    block_shape: BlockShape = (1, BLOCK)
    global_amax: GlobalAmax = "dynamic"
    static_amax: float = STATIC_AMAX
    rht: Rht = "off"
    rounding: Rounding = "rtne"
    four_over_six: FourOverSix | None = None
    row_scaled: bool = False

    def __post_init__(self) -> None:
        _check_choices(self, _CHOICES)
        if not (0 < self.static_amax < math.inf):
            raise ValueError(f"static_amax: {self.static_amax} must be positive and finite. {STATIC_AMAX} gives the scale 2^11.")
        if self.four_over_six and (self.rht != "off" or self.rounding != "rtne" or self.global_amax != "dynamic"):
            raise ValueError("four_over_six: set, but it needs rht='off', rounding='rtne', global_amax='dynamic'. Drop it or them.")
        if self.row_scaled and (
            self.rht != "off" or self.rounding != "rtne" or self.global_amax != "dynamic" or self.block_shape != (1, BLOCK)
        ):
            raise ValueError(
                "row_scaled: set, but it needs block_shape=(1, 16), rht='off', rounding='rtne', global_amax='dynamic'. Drop it or them."
            )

    @property
    def e4m3_bound(self) -> int:
        return self.four_over_six.bound if self.four_over_six else E4M3_BOUND

    @property
    def same_both_ways(self) -> bool:
        """Whether both directions hold the same codes, transposed: square blocks without a rotation."""
        return self.block_shape == (BLOCK, BLOCK) and self.rht == "off"

    @property
    def rowwise(self) -> "QuantizerSpec":
        return self

    @property
    def columnwise(self) -> "QuantizerSpec":
        return self


@dataclass(frozen=True)
class SpecByDirection:
    """How a tensor is quantised where its directions differ in more than the transform."""

    rowwise: QuantizerSpec
    columnwise: QuantizerSpec


OperandSpec = QuantizerSpec | SpecByDirection

_CHOICES = {
    "block_shape": ((1, BLOCK), (BLOCK, BLOCK)),
    "global_amax": ("dynamic", "dynamic_pow2", "static"),
    "rht": ("off", "signed", "unsigned"),
    "rounding": ("rtne", "sr"),
}


def _check_choices(options: object, choices: dict[str, tuple]) -> None:
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            raise ValueError(f"{name}: {getattr(options, name)!r} is not one of {', '.join(map(repr, allowed))}. Choose one of them.")


@dataclass(frozen=True)
class Recipe:
    """How a linear layer computes.

    Attributes:
        name: of the option in conf/precision.
        dtype: "fp32" or "bf16": weights and activations, and what is not quantised.
        format: "none", "fp8", "mxfp8" or "nvfp4".
        input: of fprop (rowwise) and wgrad (columnwise); None unless format is "nvfp4", like the other two.
        weight: of fprop and dgrad.
        grad_output: of dgrad and wgrad.

    Raises:
        ValueError: Hadamard transforms that do not cancel in a product, or stochastic rounding in the forward pass.
    """

    name: str
    dtype: str
    format: str
    input: OperandSpec | None = None
    weight: OperandSpec | None = None
    grad_output: OperandSpec | None = None

    def __post_init__(self) -> None:
        if self.format != "nvfp4":
            return
        for name in ("input", "weight"):
            if getattr(self, name).rowwise.rounding != "rtne":
                raise ValueError(f"rounding of {name} rowwise: a forward pass, which may run twice, rounds to nearest. Set it columnwise.")
        rht = {name: spec.columnwise.rht for name, spec in self.operands.items()}
        if rht["weight"] != "off" or rht["input"] != rht["grad_output"]:
            raise ValueError("rht: the transform cancels in wgrad alone. Give input and grad_output the same one, and weight none.")

    @property
    def operands(self) -> dict[str, OperandSpec]:
        """input, weight and grad_output; empty unless format is "nvfp4"."""
        return {name: getattr(self, name) for name in OPERANDS} if self.format == "nvfp4" else {}

    @property
    def quantised_by_kernels(self) -> bool:
        """Whether the Triton kernels support all of it. On a GPU the torch reference quantises the rest, which is slow."""
        specs = [getattr(spec, direction) for spec in self.operands.values() for direction in DIRECTIONS]
        return not any(spec.four_over_six or spec.row_scaled for spec in specs)

    @property
    def weight_operands(self) -> int:
        """Quantised matrices of one weight that fprop and dgrad read unchanged in every pass: 2, or 1 where both directions are the same.

        0 where it is rounded stochastically, differently in each backward pass.
        """
        if self.weight is None or "sr" in (self.weight.rowwise.rounding, self.weight.columnwise.rounding):
            return 0
        return 1 if isinstance(self.weight, QuantizerSpec) and self.weight.same_both_ways else 2

    @property
    def rounds_stochastically(self) -> bool:
        return any("sr" in (spec.rowwise.rounding, spec.columnwise.rounding) for spec in self.operands.values())

    def describe(self) -> str:
        """How the three operands are quantised, in one line; empty unless format is "nvfp4"."""
        return "; ".join(f"{name} {_describe_operand(spec)}" for name, spec in self.operands.items())


def joined_names(own: str | None, named: Iterable[str]) -> str | None:
    """A model's precision in a table: its recipe and those of some of its layers."""
    return " and ".join(dict.fromkeys(filter(None, [own, *named]))) or None


def _describe_operand(spec: OperandSpec) -> str:
    if isinstance(spec, SpecByDirection):
        return " and ".join(f"{_describe(getattr(spec, direction))} {direction}" for direction in DIRECTIONS)
    return _describe(spec, transformed=" columnwise")


def _describe(spec: QuantizerSpec, transformed: str = "") -> str:
    amax = f"static amax {spec.static_amax:.6g}" if spec.global_amax == "static" else f"{spec.global_amax} amax"
    height, width = spec.block_shape
    parts = [amax, f"{height}x{width}", spec.rounding]
    parts += [f"{'unsigned ' * (spec.rht == 'unsigned')}RHT{transformed}"] if spec.rht != "off" else []
    parts += [f"4 over 6 by {spec.four_over_six.error} up to {spec.e4m3_bound}"] if spec.four_over_six else []
    return ", ".join(parts)
