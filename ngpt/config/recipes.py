"""From the options of a recipe to its description (`ngpt.recipes`)."""

from dataclasses import dataclass, replace
from typing import Literal

from ngpt.config.schema import OperandConfig, RecipeConfig
from ngpt.recipes import (
    DIRECTIONS,
    OPERANDS,
    STATIC_AMAX,
    BlockShape,
    Direction,
    FourOverSix,
    GlobalAmax,
    OperandSpec,
    QuantizerSpec,
    Recipe,
    Rounding,
    SpecByDirection,
)

TABLE = [*OPERANDS, *(f"{operand}_{direction}" for operand in OPERANDS for direction in DIRECTIONS)]  # keys of `precision.operands`
_BLOCK_SHAPES: dict[str, BlockShape] = {"1x16": (1, 16), "16x16": (16, 16)}
_ROUNDINGS: dict[str, Rounding] = {"nearest": "rtne", "stochastic": "sr"}
_FOUR_OVER_SIX_ERRORS: dict[str, Literal["MAE", "MSE"]] = {"mae": "MAE", "mse": "MSE"}


@dataclass
class Options:
    """An `OperandConfig` without nulls: every option of one operand in one direction."""

    amax: GlobalAmax
    static_amax: float
    blocks: str
    rounding: str
    rht: Literal["none", "signed", "unsigned"]
    four_over_six: str = "none"
    bound: Literal[256, 448] = FourOverSix.bound


def recipe_of(section: RecipeConfig) -> Recipe:
    """The recipe that a section of the config asks for.

    The Hadamard transform goes to both operands of wgrad (columnwise input and grad_output), where it cancels; never to the weight.

    Raises:
        ValueError: options of one operand that exclude each other, or transforms that do not cancel.
    """
    if section.format != "nvfp4":
        return Recipe(section.name, section.dtype, section.format)
    return Recipe(section.name, section.dtype, section.format, **{operand: _operand(section, operand) for operand in OPERANDS})


def options_of(section: RecipeConfig, operand: str, direction: Direction) -> Options:
    """Every option of one operand in one direction: its own, those of its operand, those of the recipe, in this order."""
    gradient = operand == "grad_output"
    found = Options(
        amax=getattr(section, f"{operand}_amax"),
        static_amax=section.static_grad_amax if gradient else STATIC_AMAX,
        blocks=section.weight_blocks if operand == "weight" else "1x16",
        rounding="stochastic" if gradient and section.stochastic_rounding else "nearest",
        rht="signed" if section.rht and operand != "weight" and direction == "columnwise" else "none",
    )
    for key in (operand, f"{operand}_{direction}"):
        for name, value in vars(section.operands.get(key, OperandConfig())).items():
            if value is not None and (name, key, direction) != ("rht", operand, "rowwise"):  # only columnwise operands are transformed
                setattr(found, name, value)
    return found


def key_of(section: RecipeConfig, operand: str, direction: Direction, option: str) -> str:
    """The key within a section that gives an option of one operand in one direction its value."""
    for key in (f"{operand}_{direction}", operand):
        if getattr(section.operands.get(key, OperandConfig()), option) is not None:
            return f"operands.{key}.{option}"
    if option == "rht":
        return "rht"
    of_operand = {"amax": f"{operand}_amax", "blocks": "weight_blocks" if operand == "weight" else None}
    of_gradient = {"static_amax": "static_grad_amax", "rounding": "stochastic_rounding"} if operand == "grad_output" else {}
    return (of_operand | of_gradient).get(option) or f"operands.{operand}.{option}"


def _operand(section: RecipeConfig, operand: str) -> OperandSpec:
    specs = []
    for direction in DIRECTIONS:
        try:
            specs.append(_spec(options_of(section, operand, direction)))
        except ValueError as error:
            raise ValueError(f"{operand} {direction}: {error}") from error
    rowwise, columnwise = specs
    if rowwise.rht != "off":
        raise ValueError(f"rht of {operand} rowwise: the transform is that of columnwise operands. Set it for {operand}_columnwise.")
    return columnwise if replace(columnwise, rht="off") == rowwise else SpecByDirection(rowwise, columnwise)


def _spec(options: Options) -> QuantizerSpec:
    four_over_six = None
    if options.four_over_six != "none":
        four_over_six = FourOverSix(options.bound, _FOUR_OVER_SIX_ERRORS[options.four_over_six])
    return QuantizerSpec(
        block_shape=_BLOCK_SHAPES[options.blocks],
        global_amax=options.amax,
        static_amax=options.static_amax,
        rht="off" if options.rht == "none" else options.rht,
        rounding=_ROUNDINGS[options.rounding],
        four_over_six=four_over_six,
    )
