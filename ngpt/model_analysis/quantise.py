"""Puts a model's block linears into a recipe's format, in place and only inside a context."""

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
    """Restores the parameters bit for bit on exit, from a copy, whatever was written into them."""
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


@contextmanager
def quantised_weights(linears: Sequence[Linear], spec: QuantizerSpec) -> Iterator[None]:
    """Inside the context, weights are as fprop reads them: quantised rowwise, with one amax per joined matrix or per expert."""
    with restored(parameter for linear in linears for parameter in linear.parameters):
        for linear in linears:
            linear.write(quantised_weight(linear, spec))
        yield


@contextmanager
def quantised_inputs(linears: Sequence[Linear], spec: QuantizerSpec) -> Iterator[None]:
    """Inside the context, inputs are as fprop reads them. An amax is over all tokens of a call, for an expert over its own."""
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
    """The error for a recipe that cannot quantise a linear layer."""
    return ConfigError("--recipe", linear.name, str(error), "Name a recipe that fits this model")


def weight_spec(recipe: Recipe, blocks: str | None = None) -> QuantizerSpec:
    """How a recipe quantises weights for fprop.

    Args:
        blocks: "1x16" or "16x16" instead of the recipe's own.
    """
    assert recipe.weight is not None, f"{recipe.name} quantises no weights"
    spec = recipe.weight.rowwise
    if blocks is None:
        return spec
    return replace(spec, block_shape=(int(blocks.partition("x")[0]), BLOCK))
