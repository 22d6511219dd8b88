"""The linears of all experts of a rank in one call, with emulated NVFP4 operands: `emulated_linear` of each expert, in a few launches.

Every expert's tokens are filled up with zeros to whole blocks, so that no block crosses experts and all tokens are quantised at once;
so are all weights. The scales of input and weight are constant. Where that of grad_output follows its amax, it follows each expert's own:
with powers of two, dividing an expert's rows by its factor, quantising all rows under the constant scale and multiplying the operands by
the factor again gives the bits of quantising that expert alone.

Shapes: x_TK tokens sorted by expert, by input features, T counts the zeros that fill up; each expert's weight [N, K]; y_TN.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from megatron_ext.precision.linear import LinearCall, add_product, adds_in_place, multiply, operand_dtype
from ngpt.kernels.nvfp4_quantize import emulate
from ngpt.precision.quantize import rounded_amax
from ngpt.precision.tensor import Operand
from ngpt.recipes import STATIC_AMAX, QuantizerSpec

TOKEN_MULTIPLE = 32  # the largest block along tokens of all formats: MXFP8's


class ExpertTokens:
    """Where each expert's tokens lie before and after they are filled up to a multiple of `TOKEN_MULTIPLE`.

    Args:
        tokens: of each expert.
        device: of the matrices.

    Attributes:
        sizes: rows of each expert, the zeros included.
    """

    def __init__(self, tokens: list[int], device: torch.device):
        self.tokens, self.device = tokens, device
        self.sizes = [-(-count // TOKEN_MULTIPLE) * TOKEN_MULTIPLE for count in tokens]

    @cached_property
    def rows(self) -> Tensor | None:
        """int64: the row of each token among the filled-up rows; None where nothing is filled up."""
        if self.sizes == self.tokens:
            return None
        filled = [size - count for size, count in zip(self.sizes, self.tokens, strict=True)]
        shifts = list(accumulate(filled, initial=0))[:-1]
        total = sum(self.tokens)
        return torch.arange(total, device=self.device) + self._repeat(shifts, self.tokens, total)

    @cached_property
    def expert_of_block(self) -> Tensor:
        """int64: the expert of every `TOKEN_MULTIPLE` rows."""
        blocks = [size // TOKEN_MULTIPLE for size in self.sizes]
        return self._repeat(range(len(blocks)), blocks, sum(blocks))

    def _repeat(self, values: Sequence[int], times: Sequence[int], total: int) -> Tensor:
        """Each value so many times; one copy to the device, from pinned memory, which nothing waits for."""
        both = torch.tensor([list(values), list(times)], pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
        return torch.repeat_interleave(*both, output_size=total)

    def fill_up(self, x: Tensor) -> Tensor:
        if self.rows is None:
            return x
        return x.new_zeros(sum(self.sizes), x.size(1)).index_copy_(0, self.rows, x)

    def take(self, x_TK: Tensor) -> Tensor:
        """The tokens among the filled-up rows."""
        return x_TK if self.rows is None else x_TK.index_select(0, self.rows)

    def split(self, x_TK: Tensor) -> tuple[Tensor, ...]:
        return x_TK.split(self.sizes)


class _EmulatedGroupedLinear(torch.autograd.Function):
    """`emulated_grouped_linear`: tokens and each expert's weight in, their gradients out; shapes and dtypes are told there."""

    @staticmethod
    def forward(ctx, x: Tensor, tokens: ExpertTokens, call: LinearCall, *weights: Tensor) -> Tensor:
        dtype, x_TK = operand_dtype(x), tokens.fill_up(x)
        x_row, x_col = emulate(x_TK, call.recipe.input, columnwise=call.needs_backward, dtype=dtype)
        w_row, _ = emulate(torch.cat(weights), call.recipe.weight, columnwise=False, dtype=dtype)
        y_TN = x.new_empty(x_TK.size(0), weights[0].size(0))
        grouped_gemm("TN", w_row.values.chunk(len(weights)), tokens.split(x_row.values), tokens.split(y_TN))
        if call.watch:
            _watch_forward(call, tokens, x_TK, weights)
        if call.needs_backward:
            ctx.tokens, ctx.call = tokens, call
            ctx.save_for_backward(x_col.values, *weights)
            ctx.main_grads = [getattr(weight, "main_grad", None) for weight in weights]
        return tokens.take(y_TN)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x_col, *weights = ctx.saved_tensors
        tokens, call = ctx.tokens, ctx.call
        dtype, dy_TN = operand_dtype(grad), tokens.fill_up(grad)
        seed = call.rounding_seed()
        dy_row, dy_col = _quantize_gradient(dy_TN, call.recipe.grad_output, tokens, seed, dtype)
        _, w_col = emulate(torch.cat(weights), call.recipe.weight, rowwise=False, dtype=dtype)
        w_cols = w_col.values.chunk(len(weights))
        dx_TK = grad.new_empty(dy_TN.size(0), weights[0].size(1))
        grouped_gemm("NN", w_cols, tokens.split(dy_row), tokens.split(dx_TK))
        grad_weights: Sequence[Tensor | None] = [None] * len(weights)
        if ctx.needs_input_grad[3]:
            grad_weights = _weight_gradients(tokens.split(dy_col), tokens.split(x_col), weights, ctx.main_grads)
            if call.watch:
                _watch_backward(call, tokens, dy_TN, weights, x_col, seed)
        return tokens.take(dx_TK), None, None, *grad_weights


def emulated_grouped_linear(x: Tensor, weights: list[Tensor], sizes: list[int], call: LinearCall) -> Tensor:
    """x weight^T with each expert's own weight and quantised operands, in the forward and in both backward products.

    Under rounding to nearest it has the bits of `emulated_linear` of each expert's tokens, filled up with zeros; stochastic rounding draws
    from one stream for all experts instead of one for each.

    Args:
        x: [tokens, K] fp32 or bf16, sorted by expert; at least one token.
        weights: [N, K] of each expert, both multiples of 16. Gradients go to `main_grad` as `emulated_linear` says.
        sizes: tokens of each expert, 0 for some.
        call: a recipe that `ngpt.config.precision.takes_grouped_experts`, and no groups: an expert's tokens are sent by a dispatcher.

    Returns:
        [tokens, N] in x's dtype.
    """
    return _EmulatedGroupedLinear.apply(x, ExpertTokens(sizes, x.device), call, *weights)


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


def _weight_gradients(
    dy_cols: Sequence[Tensor], x_cols: Sequence[Tensor], weights: Sequence[Tensor], main_grads: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """dw [N, K] of each expert: added to its main_grad in fp32 where Megatron keeps one, else returned."""
    if not all(adds_in_place(weight, main_grad) for weight, main_grad in zip(weights, main_grads, strict=True)):
        grads = weights[0].new_empty(len(weights), *weights[0].shape).unbind()
        grouped_gemm("NT", x_cols, dy_cols, grads)
        return grads
    grouped_gemm("NT", x_cols, dy_cols, main_grads, accumulate=True)
    for weight in weights:
        weight.grad_added_to_main_grad = True
    unread = torch.empty_like(weights[0])  # Megatron's hooks want gradients to be there and do not read them
    return [unread.detach() for _ in weights]


def grouped_gemm(layout: str, a: Sequence[Tensor], b: Sequence[Tensor], out: Sequence[Tensor], accumulate: bool = False) -> None:
    """The product of each expert into `out`, with an fp32 accumulator, rounded to out's dtype once.

    Args:
        layout: b a^T (TN, fprop: weight and tokens), b a (NN, dgrad: weight and grad_output) or b^T a (NT, wgrad: tokens and grad_output).
        a, b: matrices of quantised operands, contiguous; without rows for an expert without tokens.
        out: one matrix for each expert, contiguous.
        accumulate: add the products to `out`, which is fp32.
    """
    (_gemm_of_transformer_engine if b[0].is_cuda else _gemm_one_by_one)(layout, a, b, out, accumulate)


def _gemm_of_transformer_engine(layout: str, a: Sequence[Tensor], b: Sequence[Tensor], out: Sequence[Tensor], accumulate: bool) -> None:
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    general_grouped_gemm(
        list(a),
        list(b),
        list(out),
        [None] * len(a),
        out[0].dtype,
        layout=layout,
        m_splits=[matrix.size(0) for matrix in b],
        grad=layout != "TN",
        accumulate=accumulate,
    )


def _gemm_one_by_one(layout: str, a: Sequence[Tensor], b: Sequence[Tensor], out: Sequence[Tensor], accumulate: bool) -> None:
    for right, left, result in zip(a, b, out, strict=True):
        right = right.t() if layout[0] == "T" else right
        left = left.t() if layout[1] == "T" else left
        if accumulate:
            add_product(result, left, right)
        else:
            result.copy_(multiply(left, right, None, result.dtype))


def _watch_forward(call: LinearCall, tokens: ExpertTokens, x_TK: Tensor, weights: Sequence[Tensor]) -> None:
    """The figures of the first expert with tokens, which is quantised once more for them, alone and with its clipped elements counted."""
    expert = _watched_expert(tokens)
    x, weight, dtype = tokens.split(x_TK)[expert], weights[expert], operand_dtype(x_TK)
    x_row, _ = emulate(x, call.recipe.input, dtype=dtype, counters=call.counters("input", x))
    w_row, _ = emulate(weight, call.recipe.weight, columnwise=False, dtype=dtype, counters=call.counters("weight", x))
    call.watch.forward(x, weight, x_row, w_row)


def _watch_backward(call: LinearCall, tokens: ExpertTokens, dy_TN: Tensor, weights: Sequence[Tensor], x_col_TK: Tensor, seed: int) -> None:
    expert = _watched_expert(tokens)
    dy, weight, dtype = tokens.split(dy_TN)[expert], weights[expert], operand_dtype(dy_TN)
    dy_row, dy_col = emulate(dy, call.recipe.grad_output, seed=seed, dtype=dtype, counters=call.counters("grad_output", dy))
    _, w_col = emulate(weight, call.recipe.weight, rowwise=False, dtype=dtype, counters=call.counters("weight", dy))
    x_col = Operand(tokens.split(x_col_TK)[expert], None, call.recipe.input.columnwise.e4m3_bound)
    call.watch.backward(dy, weight, dy_row, w_col, dy_col, x_col)


def _watched_expert(tokens: ExpertTokens) -> int:
    return next(expert for expert, count in enumerate(tokens.tokens) if count)
