"""Linear layers of nGPT over any backend's tensor-parallel linears (Megatron's own or Transformer Engine's).

Shapes: x_SBD hidden states [sequence, batch, features]; with sequence parallelism the sequence is this rank's part of it.
"""

import math

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.layers.scale import ParallelScale
from ngpt.functional import l2_normalize, scale_features
from ngpt.optim.retraction import mark


class LocalColumnLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear, without the `name` that its callers pass and it does not know."""

    def __init__(self, *args, name: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)


class LocalRowLinear(RowParallelLinear):
    """Megatron's row-parallel linear, without the `name` that its callers pass and it does not know."""

    def __init__(self, *args, name: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)


class ReadsStream:
    """Mixin over a column-parallel linear: its rows live in the residual stream and have unit norm, like the tokens it reads."""

    unit_norm_input = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        mark(self.weight, unit_dim=1)


class ScaledReadsStream(ReadsStream):
    """The first linear of an MLP: u <- suv * u * sqrt(D). A gated MLP's output is (gate, up), both scaled.

    Source: MODEL.md "MLP".
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, tp_group, **kwargs):
        super().__init__(input_size, output_size, config=config, tp_group=tp_group, **kwargs)
        self.width_factor = math.sqrt(config.hidden_size)
        self.suv = ParallelScale(
            self.weight.size(0),
            init=1.0,
            scale=1.0,
            tp_group=tp_group,
            sharded=True,
            like=self.weight,
            split_halves=config.gated_linear_unit,
        )
        if hasattr(self, "activation_dtype"):
            # Transformer Engine compares all parameters with a dtype it has not seen before; the scale stays fp32.
            self.activation_dtype = config.params_dtype

    def forward(self, x_SBD: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        u_SBF, bias = super().forward(x_SBD, *args, **kwargs)
        return scale_features(u_SBF, self.suv() * self.width_factor), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(f"{prefix}suv.stored", None)  # backends differ in whether they list a submodule's parameters as their own
        return state | self.suv.sharded_state_dict(f"{prefix}suv.", sharded_offsets, metadata)


class WritesStream:
    """Mixin over a row-parallel linear: its columns live in the residual stream and have unit norm."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        mark(self.weight, unit_dim=0)


class NormalizedWritesStream(WritesStream):
    """Fine-grained normalisation: the input of the output projection has unit norm over all its features.

    Parallelism: the features are split over the tensor-parallel group; their sum of squares is all-reduced over it, forward and backward.
    Source: MODEL.md "Fine-grained"; arXiv 2605.06067.
    """

    unit_norm_input = True

    def forward(self, x_SBF: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().forward(l2_normalize(x_SBF, group=self.feature_group))
