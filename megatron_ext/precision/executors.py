"""How a linear of the blocks runs in low precision: emulated on any device, or by Transformer Engine's kernels.

`Quantizable` is a mixin over a backend's linear, tensor-parallel or of all experts of a rank. It runs the backend's own forward pass
until `apply_recipes` (megatron_ext/precision/policy.py) hands it an executor.
"""

from typing import Any, Protocol

from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region, reduce_scatter_to_sequence_parallel_region
from torch import Tensor, is_grad_enabled

from megatron_ext.precision.grouped import emulated_grouped_linear
from megatron_ext.precision.linear import LinearCall, emulated_linear
from megatron_ext.precision.state import PrecisionState
from megatron_ext.precision.te_recipes import autocast, quantizers_of_experts
from ngpt.recipes import Recipe


class Executor(Protocol):
    """Runs one linear of one rank, in low precision or to look at its operands.

    An executor may have an attribute `active`, False for steps in which the linear runs its backend's own GEMMs. Without it, it is active.
    """

    def __call__(self, linear: "Quantizable", x: Tensor, *sizes: list[int]) -> tuple[Tensor, None]: ...


class Quantizable:
    """Mixin over a linear without bias; its GEMMs can run in low precision.

    Attributes:
        executor: what runs it, or None for the backend's own GEMMs.
        unit_norm_input: whether every token that reaches this linear has unit norm: what static scaling relies on.
        num_matrices: matrices stacked in its weight: one, or one for each expert.
    """

    executor: Executor | None = None
    unit_norm_input = False
    num_matrices = 1

    @property
    def is_executed(self) -> bool:
        """Whether an executor runs the GEMMs of this step."""
        return self.executor is not None and getattr(self.executor, "active", True)

    def forward(self, x: Tensor, *sizes: list[int]) -> tuple[Tensor, Tensor | None]:
        return self.executor(self, x, *sizes) if self.is_executed else super().forward(x, *sizes)

    def forward_in_backend(self, x: Tensor, *sizes: list[int]) -> tuple[Tensor, Tensor | None]:
        """The backend's own forward pass."""
        return super().forward(x, *sizes)


class _QuantizableParallel(Quantizable):
    """A tensor-parallel linear.

    Attributes:
        splits_rows: column parallel: output features are split over the ranks; else row parallel.
    """

    splits_rows: bool

    def __init__(self, *args, tp_group, **kwargs):
        super().__init__(*args, tp_group=tp_group, **kwargs)
        self.feature_group = tp_group


class QuantizableColumn(_QuantizableParallel):
    splits_rows = True


class QuantizableRow(_QuantizableParallel):
    splits_rows = False


class QuantizableGrouped(Quantizable):
    """A linear of all experts of a rank. forward takes tokens sorted by expert, and the number of tokens of each.

    Parallelism: none of its own, for column- and row-parallel experts alike. Megatron's token dispatcher communicates.
    """

    def __init__(self, num_gemms: int, *args, pg_collection, **kwargs):
        super().__init__(num_gemms, *args, pg_collection=pg_collection, **kwargs)
        self.num_matrices, self.feature_group = num_gemms, pg_collection.expt_tp


class _OfState:
    """An executor that is active where the rank's linears are in low precision."""

    state: PrecisionState

    @property
    def active(self) -> bool:
        return self.state.active


class _Emulated(_OfState):
    """NVFP4 operands for the three GEMMs, on any device and backend; the module keeps weights and checkpoints.

    Args:
        state: shared by the rank's linears.
        recipe: of the linear.
        name: of the linear, for the diagnostics.
        index: of the linear among all linears of the model, for its rounding stream.
    """

    def __init__(self, state: PrecisionState, recipe: Recipe, name: str, index: int):
        self.state, self.recipe, self.name, self.index = state, recipe, name, index

    def _call(self, **parallel: Any) -> LinearCall:
        return LinearCall(
            recipe=self.recipe,
            rounding_seed=lambda: self.state.next_rounding_seed(self.index),
            needs_backward=is_grad_enabled(),
            watch=self.state.watch(self.name, self.recipe),
            weights=self.state.weights,
            **parallel,
        )


class EmulatedExecutor(_Emulated):
    """A tensor-parallel linear with NVFP4 operands."""

    def __call__(self, linear: _QuantizableParallel, x: Tensor) -> tuple[Tensor, None]:
        group = linear.feature_group
        alone = group.size() == 1 or _is_served_by_dispatcher(linear)
        column = group if linear.splits_rows and not alone else None
        gathers = linear.sequence_parallel
        call = self._call(gather_group=column if gathers else None, reduce_group=None if gathers else column)
        y = emulated_linear(x, linear.weight, call)
        if linear.splits_rows or alone:
            return y, None
        if linear.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(y, group=group), None
        return reduce_from_tensor_model_parallel_region(y, group=group), None


class GroupedExecutor(_Emulated):
    """The linears of all experts of a rank with NVFP4 operands."""

    def __call__(self, linear: QuantizableGrouped, x: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor | None]:
        if x.size(0) == 0:
            return linear.forward_in_backend(x, sizes)
        return emulated_grouped_linear(x, linear.weight, sizes, self._call()), None


def _is_served_by_dispatcher(linear: _QuantizableParallel) -> bool:
    """Whether the linear belongs to an expert that is cut over ranks. There Megatron's token dispatcher communicates.

    Megatron's own linears say so; in Transformer Engine's Megatron clears the parallel mode.
    """
    return getattr(linear, "explicit_expert_comm", False) or getattr(linear, "parallel_mode", "any") is None


class NativeExecutor(_OfState):
    """Transformer Engine's own kernels, under its autocast context with the linear's recipe."""

    def __init__(self, state: PrecisionState, te_recipe):
        self.state, self.te_recipe = state, te_recipe

    def __call__(self, linear: Quantizable, x: Tensor) -> tuple[Tensor, Tensor | None]:
        with autocast(self.te_recipe):
            return linear.forward_in_backend(x)


class NativeGroupedExecutor(_OfState):
    """The linears of all experts of a rank by Transformer Engine's own kernels; the module keeps weights and checkpoints."""

    def __init__(self, state: PrecisionState, te_recipe):
        from megatron_ext.precision import te_grouped  # imports Transformer Engine

        self.state, self.te_grouped, self.quantizers = state, te_grouped, quantizers_of_experts(te_recipe)

    def __call__(self, linear: QuantizableGrouped, x: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor | None]:
        if x.size(0) == 0:
            return linear.forward_in_backend(x, sizes)
        call = self.te_grouped.GroupedCall(self.quantizers, is_grad_enabled(), self.state.weights)
        return self.te_grouped.native_grouped_linear(x, linear.weight, sizes, call), None
