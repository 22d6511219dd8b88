"""The linears of all experts of a rank in one call: `grouped_linear` in high precision, `emulated_grouped_linear` with NVFP4 operands,
which is `emulated_linear` of each expert, in a few launches.

In both, torch's grouped product multiplies every token with its expert's matrix; in BF16, where an expert's tokens end is read on the GPU.

Emulated, every expert's tokens are filled up with zeros to whole blocks, so that no block crosses experts and all tokens are quantised at
once; so are all weights. The scales of input and weight are constant. Where that of grad_output follows its amax, it follows each expert's
own: an expert's rows are divided by its factor, a power of two, all rows are quantised under the constant scale, and the operands are
multiplied by the factor again. This gives the bits of quantising that expert alone.

Shapes: x_TK tokens sorted by expert, by input features, T counts the zeros that fill up; the weight [E * N, K] of E experts, stacked; y_TN.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from megatron_ext.precision.linear import LinearCall, added_in_place, adds_in_place, operand_dtype, weight_gradient_alone
from ngpt.kernels.grouped_gradient import add_gradients
from ngpt.kernels.nvfp4_quantize import emulate
from ngpt.precision.quantize import rounded_amax
from ngpt.precision.tensor import Operand
from ngpt.recipes import STATIC_AMAX, QuantizerSpec

TOKEN_MULTIPLE = 32  # the largest block along tokens of all formats: MXFP8's


class ExpertTokens:
    """Where each expert's tokens lie, before and after they are filled up to a multiple of `TOKEN_MULTIPLE`.

    Args:
        sizes: tokens of each expert.
        device: of the matrices.
    """

    def __init__(self, sizes: list[int], device: torch.device):
        self.sizes, self.device = sizes, device

    @cached_property
    def ends(self) -> Tensor:
        """int32: one past the last token of each expert."""
        return self._to_device(list(accumulate(self.sizes)), torch.int32)

    @cached_property
    def filled(self) -> "ExpertTokens":
        sizes = [-(-size // TOKEN_MULTIPLE) * TOKEN_MULTIPLE for size in self.sizes]
        return self if sizes == self.sizes else ExpertTokens(sizes, self.device)

    @cached_property
    def rows(self) -> Tensor | None:
        """int64: the row of each token among the filled-up rows; None where nothing is filled up."""
        if self.filled is self:
            return None
        zeros = [size - count for size, count in zip(self.filled.sizes, self.sizes, strict=True)]
        shifts = list(accumulate(zeros, initial=0))[:-1]
        total = sum(self.sizes)
        return torch.arange(total, device=self.device) + self._repeat(shifts, self.sizes, total)

    @cached_property
    def expert_of_block(self) -> Tensor:
        """int64: the expert of every `TOKEN_MULTIPLE` rows of filled-up ones."""
        blocks = [size // TOKEN_MULTIPLE for size in self.filled.sizes]
        return self._repeat(range(len(blocks)), blocks, sum(blocks))

    def fill_up(self, x: Tensor) -> Tensor:
        if self.rows is None:
            return x
        return x.new_zeros(sum(self.filled.sizes), x.size(1)).index_copy_(0, self.rows, x)

    def take(self, x_TK: Tensor) -> Tensor:
        """The tokens among the filled-up rows."""
        return x_TK if self.rows is None else x_TK.index_select(0, self.rows)

    def _repeat(self, values: Sequence[int], times: Sequence[int], total: int) -> Tensor:
        """Each value repeated so many times."""
        both = self._to_device([list(values), list(times)], torch.int64)
        return torch.repeat_interleave(*both, output_size=total)

    def _to_device(self, values: list, dtype: torch.dtype) -> Tensor:
        """One copy from pinned memory; nothing waits for it."""
        return torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)


def tokens_of(sizes: list[int], device: torch.device) -> ExpertTokens:
    """Where the current layer's tokens lie. Both of its linears get the same sizes, one after the other."""
    return _tokens(tuple(sizes), device)


@lru_cache(maxsize=1)
def _tokens(sizes: tuple[int, ...], device: torch.device) -> ExpertTokens:
    return ExpertTokens(list(sizes), device)


class _GroupedLinear(torch.autograd.Function):
    """`grouped_linear`: x and the stacked weight in, their gradients out."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, tokens: ExpertTokens) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.tokens, ctx.main_grad = tokens, getattr(weight, "main_grad", None)
        return multiply_grouped(x, _matrices(weight, tokens).transpose(1, 2), tokens.ends, x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        tokens, grad = ctx.tokens, grad.contiguous()
        grad_x, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            grad_x = multiply_grouped(grad, _matrices(weight, tokens), tokens.ends, grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, x, tokens, weight, ctx.main_grad)
        return grad_x, grad_weight, None


def grouped_linear(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """x W_e^T with the matrix of each token's expert.

    Args:
        x: [tokens, K] contiguous, sorted by expert; there may be none.
        weight: [E * N, K] in x's dtype; bf16 and fp16 on CUDA: K and N are multiples of 8. Its gradient goes to `main_grad` as
            `emulated_linear` says.
        sizes: tokens of each expert, 0 for some.

    Returns:
        [tokens, N] in x's dtype, of fp32 sums.
    """
    return _GroupedLinear.apply(x, weight, tokens_of(sizes, x.device))


class _EmulatedGroupedLinear(torch.autograd.Function):
    """`emulated_grouped_linear`: tokens and the stacked weight in, their gradients out; shapes and dtypes are told there."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, tokens: ExpertTokens, call: LinearCall) -> Tensor:
        dtype, x_TK = operand_dtype(x), tokens.fill_up(x)
        x_row, x_col = emulate(x_TK, call.recipe.input, columnwise=call.needs_backward, dtype=dtype)
        w_row, w_col = call.kept_operands(weight, dtype) or emulate(weight, call.recipe.weight, columnwise=False, dtype=dtype)
        y_TN = multiply_grouped(x_row.values, _matrices(w_row.values, tokens).transpose(1, 2), tokens.filled.ends, x.dtype)
        if call.watch:
            _watch_forward(call, tokens, x_TK, weight)
        if call.needs_backward:
            ctx.tokens, ctx.call = tokens, call
            ctx.w_col = w_col  # None where it is not kept
            ctx.save_for_backward(x_col.values, weight)
            ctx.main_grad = getattr(weight, "main_grad", None)
        return tokens.take(y_TN)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x_col, weight = ctx.saved_tensors
        tokens, call = ctx.tokens, ctx.call
        dtype, dy_TN = operand_dtype(grad), tokens.fill_up(grad)
        seed = call.rounding_seed()
        dy_row, dy_col = _quantize_gradient(dy_TN, call.recipe.grad_output, tokens, seed, dtype)
        w_col = ctx.w_col or emulate(weight, call.recipe.weight, rowwise=False, dtype=dtype)[1]
        dx_TK = multiply_grouped(dy_row, _matrices(w_col.values, tokens), tokens.filled.ends, grad.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(dy_col, x_col, tokens.filled, weight, ctx.main_grad)
            if call.watch:
                _watch_backward(call, tokens, dy_TN, weight, x_col, seed, ctx.main_grad)
        return tokens.take(dx_TK), grad_weight, None, None


def emulated_grouped_linear(x: Tensor, weight: Tensor, sizes: list[int], call: LinearCall) -> Tensor:
    """x weight^T with each expert's own weight and quantised operands, in the forward and in both backward products.

    Under rounding to nearest it has the bits of `emulated_linear` of each expert's tokens, filled up with zeros; stochastic rounding draws
    from one stream for all experts instead of one for each.

    Args:
        x: [tokens, K] fp32 or bf16, sorted by expert; at least one token.
        weight: [E * N, K], N and K multiples of 16. Its gradient goes to `main_grad` as `emulated_linear` says.
        sizes: tokens of each expert, 0 for some.
        call: a recipe that `ngpt.config.experts.takes_grouped_experts`, and no process groups: a dispatcher sends an expert's tokens.

    Returns:
        [tokens, N] in x's dtype.
    """
    return _EmulatedGroupedLinear.apply(x, weight, tokens_of(sizes, x.device), call)


def multiply_grouped(a: Tensor, b: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Each group of a's rows times its matrix, with an fp32 accumulator, rounded to `dtype` once.

    Args:
        a: [rows, inner], its groups one after the other.
        b: [groups, inner, columns], contiguous or the transpose of such.
        ends: int32: one past the last row of each group.
    """
    if not a.size(0):
        return a.new_empty(0, b.size(2), dtype=dtype)
    if dtype == torch.float32:  # the grouped kernels round bf16 products to bf16
        a, b = a.float(), b.float()
    return grouped_mm(a, b, offs=ends).to(dtype)


def _matrices(weight: Tensor, tokens: ExpertTokens) -> Tensor:
    return weight.view(len(tokens.sizes), -1, weight.size(1))


def _quantize_gradient(dy_TN: Tensor, spec: QuantizerSpec, tokens: ExpertTokens, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both directions of grad_output, each expert's rows under its own scale."""
    if spec.global_amax == "static":
        row, column = emulate(dy_TN, spec, seed=seed, dtype=dtype)
        return row.values, column.values
    factors = _row_factors(dy_TN, spec, tokens)
    normal = dataclasses.replace(spec, global_amax="static", static_amax=STATIC_AMAX)
    normal_TN = torch.mul(dy_TN, factors.reciprocal(), out=torch.empty_like(dy_TN))
    row, column = emulate(normal_TN, normal, seed=seed, dtype=dtype)
    assert row is not column  # as they would be with square blocks
    return row.values.mul_(factors), column.values.mul_(factors)


def _row_factors(dy_TN: Tensor, spec: QuantizerSpec, tokens: ExpertTokens) -> Tensor:
    """fp32 [T, 1]: what an expert's amax, rounded as the spec says, is of `STATIC_AMAX`: a power of two, 1 of zeros, or not finite."""
    of_rows = torch.maximum(dy_TN.amax(1), -dy_TN.amin(1)).float()
    of_blocks = of_rows.view(-1, TOKEN_MULTIPLE).amax(1)
    largest = of_blocks.new_zeros(len(tokens.sizes)).scatter_reduce_(0, tokens.expert_of_block, of_blocks, "amax")
    amax = rounded_amax(largest, spec)
    factors = torch.where(amax == 0, 1.0, torch.div(amax, torch.full_like(amax, STATIC_AMAX)))
    return factors.index_select(0, tokens.expert_of_block).repeat_interleave(TOKEN_MULTIPLE).unsqueeze(1)


def _weight_gradient(dy_TN: Tensor, x_TK: Tensor, tokens: ExpertTokens, weight: Tensor, main_grad: Tensor | None) -> Tensor:
    """dw [E * N, K]: added to main_grad in fp32 where Megatron keeps one, else returned."""
    in_place = adds_in_place(weight, main_grad)
    total = main_grad if in_place else torch.zeros_like(weight, dtype=torch.float32)
    add_gradients(_matrices(total, tokens), dy_TN, x_TK, tokens.ends)
    return added_in_place(weight) if in_place else total.to(weight.dtype)


def _watch_forward(call: LinearCall, tokens: ExpertTokens, x_TK: Tensor, weight: Tensor) -> None:
    """The figures of the first expert with tokens. For them it is quantised once more, alone, and its clipped elements are counted."""
    rows, expert = _watched(tokens)
    x, weight, dtype = x_TK[rows], _matrices(weight, tokens)[expert], operand_dtype(x_TK)
    x_row, _ = emulate(x, call.recipe.input, dtype=dtype, counters=call.counters("input", x))
    w_row, _ = emulate(weight, call.recipe.weight, columnwise=False, dtype=dtype, counters=call.counters("weight", x))
    call.watch.forward(x, weight, x_row, w_row)


def _watch_backward(
    call: LinearCall, tokens: ExpertTokens, dy_TN: Tensor, stacked: Tensor, x_col_TK: Tensor, seed: int, main_grad: Tensor | None
) -> None:
    rows, expert = _watched(tokens)
    dy, weight, dtype = dy_TN[rows], _matrices(stacked, tokens)[expert], operand_dtype(dy_TN)
    dy_row, dy_col = emulate(dy, call.recipe.grad_output, seed=seed, dtype=dtype, counters=call.counters("grad_output", dy))
    _, w_col = emulate(weight, call.recipe.weight, rowwise=False, dtype=dtype, counters=call.counters("weight", dy))
    x_col = Operand(x_col_TK[rows], None, call.recipe.input.columnwise.e4m3_bound)
    call.watch.backward(dy, weight, dy_row, w_col, dy_col, x_col)
    call.watch.weight_gradient(weight_gradient_alone(dy_col, x_col, stacked, main_grad))


def _watched(tokens: ExpertTokens) -> tuple[slice, int]:
    """The first expert with tokens: its number, and its filled-up rows, which come first."""
    return next((slice(size), expert) for expert, size in enumerate(tokens.filled.sizes) if size)
