"""Quantised weights of one training step: made for its first micro-batch, used in all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ngpt.kernels.nvfp4_quantize import emulate
from ngpt.precision.tensor import Operand
from ngpt.recipes import Recipe


class StepWeights:
    """The operands of a rank's weights, each made once a training step.

    No weight changes between the first forward and the last backward pass of a step, and outside of steps nothing is kept: an evaluation,
    a loaded checkpoint or a sample never meets operands of other weights.

    Args:
        keeps: whether operands are kept at all, see `ngpt.config.executor.keeps_quantized_weights`.
    """

    def __init__(self, keeps: bool):
        self.keeps = keeps
        self._operands: dict[Tensor, Any] | None = None  # None outside of steps

    @contextmanager
    def training_step(self) -> Iterator[None]:
        """A context in which operands are kept. At its end the optimizer moves the weights, and the operands are dropped."""
        self._operands = {} if self.keeps else None
        try:
            yield
        finally:
            self._operands = None

    def operands(self, weight: Tensor, recipe: Recipe, dtype: torch.dtype) -> tuple[Operand, Operand] | None:
        """The rowwise and the columnwise operand of a weight, one object where the recipe makes one matrix of both.

        Args:
            weight: [..., N, K], the parameter itself.
            recipe: of its linear, the same in each call.
            dtype: of the values, the same in each call.

        Returns:
            None where operands are not kept: every pass quantises for itself.
        """
        if not recipe.weight_operands:
            return None
        return self.kept(weight, lambda: emulate(weight.detach(), recipe.weight, dtype=dtype))

    def kept(self, weight: Tensor, quantize: Callable[[], Any]) -> Any | None:
        """What `quantize` gives for a weight; it is called once a step. None where nothing is kept, and every pass quantises for itself.

        Args:
            weight: the parameter itself, found again by its identity.
            quantize: the same for a weight in each call.
        """
        if self._operands is None:
            return None
        if weight not in self._operands:
            self._operands[weight] = quantize()
        return self._operands[weight]
