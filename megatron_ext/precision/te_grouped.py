"""The linears of all experts of a rank by Transformer Engine's kernels: what its `GroupedLinear` calls, over slices of the stacked weight.

Imported only where Transformer Engine is: see te_recipes.py. File names are Transformer Engine's, as of 2.20.2. Three products and the
quantisation of three operands are six calls, each for all experts: loops in C++ (extensions/cast.cpp: split_quantize,
multi_tensor_quantize; cublaslt_gemm.cu: multi_stream_cublas_gemm), which launch for each expert. Operands are those that each expert alone
would have; only the draws of stochastic rounding come in another order.

Operands whose amax this project gives (te_nvfp4.py) are the exception: each of their parts is a Python call.

Its module is not used: it has a parameter and a Python call of its own for each expert's weight (grouped_linear.py: forward). Nor is its
single kernel for all experts (general_grouped_gemm_for_grouped_tensor), which takes cuBLAS 13.3 on Blackwell, 13.5 for fp8 on Hopper, and
no custom recipe, as nvfp4 is here (grouped_linear.py: is_module_grouped_tensor_path_supported).

Shapes: as in grouped.py. An expert without tokens takes no part in a product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch import cpp_extensions as tex
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

from megatron_ext.precision.grouped import ExpertTokens, tokens_of
from megatron_ext.precision.linear import added_in_place, adds_in_place
from megatron_ext.precision.weights import StepWeights


@dataclass(frozen=True)
class GroupedCall:
    """How one call is executed.

    Attributes:
        quantizers: of input, weight and grad_output, as `te_recipes.quantizers_of_experts` makes them; one quantises for all experts.
        needs_backward: whether the forward pass keeps what a backward pass needs.
        weights: keeps the quantised weights for the other passes of a training step.
    """

    quantizers: tuple[Any, Any, Any]
    needs_backward: bool
    weights: StepWeights


class _NativeGroupedLinear(torch.autograd.Function):
    """`native_grouped_linear`: tokens and the stacked weight in, their gradients out."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, tokens: ExpertTokens, call: GroupedCall) -> Tensor:
        of_input, of_weight, _ = call.quantizers
        sizes, matrices = tokens.filled.sizes, [weight.size(0) // len(tokens.sizes)] * len(tokens.sizes)
        x_TK, trains = tokens.fill_up(x.contiguous()), call.needs_backward and ctx.needs_input_grad[1]

        def quantize_weights(columnwise: bool = True) -> Sequence:
            return quantize_parts(weight, matrices, of_weight, columnwise)

        x_parts = quantize_parts(x_TK, _nonzero(sizes), of_input, columnwise=trains)
        w_parts = call.weights.kept(weight, quantize_weights) or quantize_weights(call.needs_backward)
        y_TN = x.new_empty(x_TK.size(0), matrices[0])
        multiply_parts("TN", _with_tokens(w_parts, sizes), x_parts, [y_TN], _nonzero(sizes))
        if call.needs_backward:
            for part in x_parts if trains else ():
                part.update_usage(rowwise_usage=False, columnwise_usage=True)
            ctx.held = x_parts if trains else None, w_parts
            ctx.tokens, ctx.call = tokens, call
            ctx.save_for_backward(weight)
            ctx.main_grad = getattr(weight, "main_grad", None)
        return tokens.take(y_TN)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,), tokens, sizes = ctx.saved_tensors, ctx.tokens, ctx.tokens.filled.sizes
        (x_parts, w_parts), ctx.held = ctx.held, None  # freed with this pass, as saved tensors are
        dy_TN = tokens.fill_up(grad.contiguous())
        dy_parts = quantize_parts(dy_TN, _nonzero(sizes), ctx.call.quantizers[2], columnwise=ctx.needs_input_grad[1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            dx_TK = grad.new_empty(dy_TN.size(0), weight.size(1))
            multiply_parts("NN", _with_tokens(w_parts, sizes), dy_parts, [dx_TK], _nonzero(sizes))
            grad_x = tokens.take(dx_TK)
        if ctx.needs_input_grad[1]:
            adds = adds_in_place(weight, ctx.main_grad)
            total = ctx.main_grad if adds else torch.zeros_like(weight)
            own = _with_tokens(total.chunk(len(sizes)), sizes)
            multiply_parts("NT", x_parts, dy_parts, own, _nonzero(sizes), accumulate=adds)
            grad_weight = added_in_place(weight) if adds else total
        return grad_x, grad_weight, None, None


def native_grouped_linear(x: Tensor, weight: Tensor, sizes: list[int], call: GroupedCall) -> Tensor:
    """x weight^T with each expert's own weight and quantised operands, in the forward and in both backward products.

    Args:
        x: [tokens, K] contiguous, sorted by expert; at least one token.
        weight: [E * N, K], N and K multiples of what the format needs. Its gradient goes to `main_grad` as `emulated_linear` says.
        sizes: tokens of each expert, 0 for some.

    Returns:
        [tokens, N] in x's dtype.

    Parallelism: none; a dispatcher sends an expert's tokens. An amax is that of an expert's own tokens and of this rank's features.
    """
    return _NativeGroupedLinear.apply(x, weight, tokens_of(sizes, x.device), call)


def quantize_parts(x: Tensor, sizes: list[int], quantizer: Any, columnwise: bool) -> Sequence:
    """Quantised tensors of x's consecutive rows, cut into parts of these sizes; rowwise, and columnwise where asked for.

    Transformer Engine splits NVFP4 only into parts of 64 rows, of no more than 64 experts and without square blocks (extensions/cast.cpp:
    split_quantize_nvfp4_impl; group_hadamard_transform.cu), so that each part is quantised as a tensor of its own.
    """
    quantizer.set_usage(rowwise=True, columnwise=columnwise)
    x = x.detach()
    if isinstance(quantizer, Float8CurrentScalingQuantizer | MXFP8Quantizer):
        return tex.split_quantize(x, sizes, [quantizer] * len(sizes))
    if isinstance(quantizer, NVFP4Quantizer):
        return tex.multi_tensor_quantize(list(x.split(sizes)), [quantizer] * len(sizes))
    return quantizer.quantize_parts(x, sizes)  # of GivenAmaxQuantizer


def multiply_parts(layout: str, a: Sequence, b: Sequence, out: list[Tensor], sizes: list[int], accumulate: bool = False) -> None:
    """fprop is "TN" of weight and input, dgrad "NN" of weight and grad_output, wgrad "NT" of input and grad_output.

    Args:
        out: one matrix of all experts' tokens, or of wgrad each expert's own.
        sizes: tokens of each part.
    """
    backward = layout != "TN"
    tex.general_grouped_gemm(
        a,
        b,
        out,
        [None] * len(sizes),
        out[0].dtype,
        layout=layout,
        m_splits=sizes,
        grad=backward,
        accumulate=accumulate,
        use_split_accumulator=backward,  # as te_recipes.py gives it to fp8 and base.py to the others
        single_output=layout != "NT",
    )


def _nonzero(sizes: list[int]) -> list[int]:
    return [size for size in sizes if size]


def _with_tokens(parts: Sequence, sizes: list[int]) -> list:
    return list(compress(parts, sizes))
