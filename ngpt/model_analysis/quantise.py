"""Block linears of a model in a recipe's format, in place and for as long as a context is open."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ngpt.config.errors import ConfigError
from ngpt.kernels.nvfp4_quantize import emulate
from ngpt.model_analysis.linears import Linear, changed_inputs
from ngpt.recipes import BLOCK, QuantizerSpec, Recipe

_DTYPES = (torch.float32, torch.bfloat16)


@contextmanager
def restored(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters have their bits back when it closes, whatever was written into them. A copy is kept beside them."""
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


@contextmanager
def quantised_weights(linears: Sequence[Linear], spec: QuantizerSpec) -> Iterator[None]:
    """Weights are what fprop reads of them: rowwise, with an amax of each joined matrix, and of each expert's."""
    with restored(parameter for linear in linears for parameter in linear.parameters):
        for linear in linears:
            linear.write(quantised_weight(linear, spec))
        yield


@contextmanager
def quantised_inputs(linears: Sequence[Linear], spec: QuantizerSpec) -> Iterator[None]:
    """Inputs are what fprop reads of them; an amax is over all tokens that meet in a call, of an expert over its own."""
    with changed_inputs(linears, lambda linear, x: dequantised(linear, x, spec)):
        yield


def quantised_weight(linear: Linear, spec: QuantizerSpec) -> Tensor:
    """[N, K], or [E, N, K]: the dequantised weight, in its dtype."""
    weight = linear.weight()
    if weight.dim() == 2:
        return dequantised(linear, weight, spec)
    return torch.stack([dequantised(linear, matrix, spec) for matrix in weight])


@torch.no_grad()
def dequantised(linear: Linear, x: Tensor, spec: QuantizerSpec) -> Tensor:
    """x, [..., K], quantised rowwise and back, in its shape and dtype."""
    try:
        operand, _ = emulate(x.flatten(0, -2), spec, columnwise=False, dtype=x.dtype if x.dtype in _DTYPES else torch.float32)
    except ValueError as error:
        raise refused(linear, error) from error
    assert operand is not None
    values = operand.values if operand.decode_factor is None else operand.values.double() * operand.decode_factor
    return values.to(x.dtype).view_as(x)


def refused(linear: Linear, error: ValueError) -> ConfigError:
    """What a user is told where a recipe cannot quantise a linear layer."""
    return ConfigError("--recipe", linear.name, str(error), "Name a recipe that fits this model")


def weight_spec(recipe: Recipe, blocks: str | None = None) -> QuantizerSpec:
    """How a recipe quantises weights for fprop.

    Args:
        blocks: "1x16" or "16x16" in place of the recipe's own.
    """
    assert recipe.weight is not None, f"{recipe.name} quantises no weights"
    spec = recipe.weight.rowwise
    if blocks is None:
        return spec
    return replace(spec, block_shape=(int(blocks.partition("x")[0]), BLOCK))
