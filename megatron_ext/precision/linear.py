"""A linear layer whose three GEMMs take NVFP4 operands, emulated on any device, under tensor and sequence parallelism.

fprop y = x_r w_r^T, dgrad dx = dy_r w_c, wgrad dw = dy_c^T x_c. Suffix r: quantised rowwise (blocks along the reduction of fprop and
dgrad's dy), c: columnwise (blocks along tokens for x and dy, along the output features for w). Both come from the high-precision
tensor. The operands hold code * block scale, which bf16 represents exactly, so an ordinary GEMM with an fp32 accumulator multiplies
them exactly; a global scale that is not a power of two is applied to the fp32 result, before its only rounding.

Shapes: x_MK tokens of this GEMM by input features of this rank, weight [N, K], y_MN.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.precision.weights import StepWeights
from ngpt.kernels.nvfp4_quantize import emulate
from ngpt.precision.diagnostics import GemmWatch
from ngpt.precision.gemm import factor_of_operands
from ngpt.precision.rounding import operand_seed
from ngpt.precision.tensor import Operand
from ngpt.recipes import Recipe


@dataclass(frozen=True)
class LinearCall:
    """How one call of an emulated linear is executed.

    Attributes:
        recipe: quantisers of input, weight and grad_output.
        rounding_seed: gives the seed of this call's stochastic rounding when its backward pass begins. fprop's operands round to nearest.
        needs_backward: whether the forward pass keeps what a backward pass needs.
        gather_group: column parallel with sequence parallelism: tokens are gathered over it, their gradient is reduce-scattered.
        reduce_group: column parallel without: the input's gradient is all-reduced over it.
        watch: takes operands for the diagnostics, or None.
        weights: keeps the weight's operands for the other passes of a training step, or None.
    """

    recipe: Recipe
    rounding_seed: Callable[[], int]
    needs_backward: bool = True
    gather_group: dist.ProcessGroup | None = None
    reduce_group: dist.ProcessGroup | None = None
    watch: GemmWatch | None = None
    weights: StepWeights | None = None

    def kept_operands(self, weight: Tensor, dtype: torch.dtype) -> tuple[Operand, Operand] | None:
        """Both operands of the weight, where they are kept. A watched call makes its own, to count what is clipped."""
        return self.weights.operands(weight, self.recipe, dtype) if self.weights and not self.watch else None

    def counters(self, operand: str, like: Tensor) -> Tensor | None:
        """Where the quantiser of `operand` counts clipped elements and flushed blocks, if anybody watches."""
        return self.watch.counters(operand, like.device) if self.watch else None


class _EmulatedLinear(torch.autograd.Function):
    """`emulated_linear`: x and weight in, their gradients out; shapes and dtypes are told there."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, call: LinearCall) -> Tensor:
        recipe, x_MK = call.recipe, x.flatten(0, -2)
        whole_MK = _gather(x_MK, call.gather_group)[0] if call.gather_group else x_MK
        # The gathered tokens are gathered again in the backward pass, so that only this rank's part stays in memory. Stochastic rounding
        # draws there, too: a forward pass may be run twice.
        keeps_columnwise = call.needs_backward and call.gather_group is None and recipe.input.columnwise.rounding == "rtne"
        dtype = operand_dtype(x)
        x_row, x_col = emulate(whole_MK, recipe.input, columnwise=keeps_columnwise, dtype=dtype, counters=call.counters("input", x))
        w_row, w_col = call.kept_operands(weight, dtype) or emulate(
            weight, recipe.weight, columnwise=False, dtype=dtype, counters=call.counters("weight", x)
        )
        y_MN = multiply(x_row.values, w_row.values.t(), factor_of_operands(x_row, w_row), x.dtype)
        if call.watch:
            call.watch.forward(whole_MK, weight, x_row, w_row)
        ctx.call, ctx.shape = call, x.shape
        ctx.columnwise = keeps_columnwise
        saved = (x_col.values, x_col.global_amax) if keeps_columnwise else (x_MK, None)
        if call.needs_backward:
            ctx.save_for_backward(*saved, weight)
            ctx.w_col = w_col  # None where it is not kept
            ctx.main_grad = getattr(weight, "main_grad", None)
        return y_MN.view(-1, *x.shape[1:-1], y_MN.size(1)) if x.dim() > 2 else y_MN

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, x_amax, weight = ctx.saved_tensors
        call, recipe = ctx.call, ctx.call.recipe
        dtype, dy_MN = operand_dtype(grad), grad.flatten(0, -2)
        gathering = None
        if call.gather_group is not None and ctx.needs_input_grad[1]:
            x, gathering = _gather(x, call.gather_group, asynchronous=True)
        seed, counters = call.rounding_seed(), call.counters("grad_output", grad)
        dy_row, dy_col = emulate(dy_MN, recipe.grad_output, seed=seed, dtype=dtype, counters=counters)
        w_col = ctx.w_col
        if w_col is None:
            w_seed, w_counters = operand_seed(seed, "weight"), call.counters("weight", grad)
            _, w_col = emulate(weight, recipe.weight, rowwise=False, seed=w_seed, dtype=dtype, counters=w_counters)
        dx_MK = multiply(dy_row.values, w_col.values, factor_of_operands(dy_row, w_col), grad.dtype)
        if gathering is not None:
            gathering.wait()
        reducing, dx_MK = _reduce(dx_MK, call)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            if ctx.columnwise:
                x_col = Operand(x, x_amax, recipe.input.columnwise.e4m3_bound)
            else:
                x_seed, x_counters = operand_seed(seed, "input"), call.counters("input", grad)
                _, x_col = emulate(x, recipe.input, rowwise=False, seed=x_seed, dtype=dtype, counters=x_counters)
            grad_weight = _weight_gradient(dy_col, x_col, weight, ctx.main_grad)
            if call.watch:
                call.watch.backward(dy_MN, weight, dy_row, w_col, dy_col, x_col)
                call.watch.weight_gradient(weight_gradient_alone(dy_col, x_col, weight, ctx.main_grad))
        if reducing is not None:
            reducing.wait()
        return dx_MK.view(ctx.shape), grad_weight, None


def emulated_linear(x: Tensor, weight: Tensor, call: LinearCall) -> Tensor:
    """x weight^T with quantised operands in the forward and in both backward GEMMs.

    Args:
        x: [..., K] fp32 or bf16; with a gather group the first dimension is this rank's part of the sequence.
        weight: [N, K] of this rank. Where it has an fp32 `main_grad` (Megatron's gradient buffer), the weight gradient is added there in
            fp32 and `grad_added_to_main_grad` is set, as Megatron's fused accumulation does; otherwise it is returned in weight's dtype.
        call: recipe and parallel execution.

    Returns:
        [..., N] in x's dtype; with a gather group over the whole sequence. Partial sums of a row-parallel layer are not reduced here.

    Parallelism: see `LinearCall`. An amax is taken over what a rank multiplies: gathered tokens, its own shard of the features, as
        Transformer Engine does.

    Source: NVFP4 as Transformer Engine 2.20.2 computes it; arXiv 2509.25149.
    """
    return _EmulatedLinear.apply(x, weight, call)


def operand_dtype(x: Tensor) -> torch.dtype:
    """bf16 feeds tensor cores and is exact for the operands; a CPU multiplies fp32 faster."""
    return torch.bfloat16 if x.is_cuda else torch.float32


def multiply(a: Tensor, b: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """factor * a b with an fp32 accumulator, rounded to `dtype` once."""
    if factor is None and a.dtype == dtype:
        return a @ b
    product = a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)
    if factor is None:
        return product.to(dtype)
    return torch.mul(product, factor, out=torch.empty_like(product, dtype=dtype))


def adds_in_place(weight: Tensor, main_grad: Tensor | None) -> bool:
    """Whether the weight gradient is added to Megatron's buffer here, of which Megatron is told."""
    return main_grad is not None and main_grad.dtype == torch.float32 and hasattr(weight, "grad_added_to_main_grad")


def added_in_place(weight: Tensor) -> Tensor:
    """Tell Megatron so. Its hook requires a gradient of weight's shape but does not read it, so it gets one that is not filled."""
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in total's dtype."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def weight_gradient_alone(dy: Operand, x: Operand, weight: Tensor, main_grad: Tensor | None) -> Tensor:
    """dw [N, K] of this micro-batch, in the dtype that it is accumulated in; nothing is added. For the diagnostics, since it multiplies."""
    dtype = torch.float32 if adds_in_place(weight, main_grad) else weight.dtype
    return multiply(dy.values.t(), x.values, factor_of_operands(dy, x), dtype)


def _weight_gradient(dy: Operand, x: Operand, weight: Tensor, main_grad: Tensor | None) -> Tensor:
    """dw [N, K]: added to main_grad in fp32 where Megatron keeps one, else returned."""
    factor = factor_of_operands(dy, x)
    if not adds_in_place(weight, main_grad):
        return multiply(dy.values.t(), x.values, factor, weight.dtype)
    if factor is not None:
        main_grad.addcmul_(multiply(dy.values.t(), x.values, None, torch.float32), factor)
    else:
        add_product(main_grad, dy.values.t(), x.values)
    return added_in_place(weight)


def _gather(x_MK: Tensor, group: dist.ProcessGroup, asynchronous: bool = False) -> tuple[Tensor, dist.Work | None]:
    whole = x_MK.new_empty(x_MK.size(0) * group.size(), x_MK.size(1))
    return whole, dist.all_gather_into_tensor(whole, x_MK.contiguous(), group=group, async_op=asynchronous)


def _reduce(dx_MK: Tensor, call: LinearCall) -> tuple[dist.Work | None, Tensor]:
    """Begin the reduction of the input's gradient over tensor-parallel ranks; it runs while wgrad is computed."""
    if call.gather_group is not None:
        part = dx_MK.new_empty(dx_MK.size(0) // call.gather_group.size(), dx_MK.size(1))
        return dist.reduce_scatter_tensor(part, dx_MK, group=call.gather_group, async_op=True), part
    if call.reduce_group is not None:
        return dist.all_reduce(dx_MK, group=call.reduce_group, async_op=True), dx_MK
    return None, dx_MK
