"""Quantised weights of one training step: made for its first micro-batch, multiplied in all."""

from collections.abc import Iterator
from contextlib import contextmanager

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
        self._operands: dict[Tensor, tuple[Operand, Operand]] | None = None  # None outside of steps

    @contextmanager
    def training_step(self) -> Iterator[None]:
        """Within it operands are kept; the optimizer moves the weights at its end, and they are dropped."""
        self._operands = {} if self.keeps else None
        try:
            yield
        finally:
            self._operands = None

    def operands(self, weight: Tensor, recipe: Recipe, dtype: torch.dtype) -> tuple[Operand, Operand] | None:
        """The rowwise and the columnwise operand of a weight, one object where the recipe makes one matrix of both.

        Args:
            weight: [..., N, K], the parameter itself: it is found again as this object.
            recipe: of its linear, the same in each call.
            dtype: of the values, the same in each call.

        Returns:
            None where operands are not kept: every pass quantises for itself.
        """
        if self._operands is None or not recipe.weight_operands:
            return None
        found = self._operands.get(weight)
        if found is None:
            found = self._operands[weight] = emulate(weight.detach(), recipe.weight, dtype=dtype)
        return found
