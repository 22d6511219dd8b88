"""Linear layers of nGPT over any backend's tensor-parallel linears (Megatron's own or Transformer Engine's).

Shapes: x_SBD hidden states [sequence, batch, features]; with sequence parallelism the sequence is this rank's part of it.
"""

import math

from megatron.core.ssm.mamba_mixer import _split_tensor_factory
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


class _ScaledReadsStream(ReadsStream):
    """u <- scale * u * sqrt(D), with one scale for each output feature, in the submodule called `scale_name`."""

    scale_name: str

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, tp_group, **kwargs):
        super().__init__(input_size, output_size, config=config, tp_group=tp_group, **kwargs)
        self.width_factor = math.sqrt(config.hidden_size)
        scale = ParallelScale(
            self.weight.size(0),
            init=1.0,
            scale=1.0,
            tp_group=tp_group,
            sharded=True,
            like=self.weight,
            split_halves=self.splits_halves(config),
        )
        self.add_module(self.scale_name, scale)
        if hasattr(self, "activation_dtype"):
            # Transformer Engine compares all parameters with a dtype it has not seen before; the scale stays fp32.
            self.activation_dtype = config.params_dtype

    @staticmethod
    def splits_halves(config: TransformerConfig) -> bool:
        """Whether the output has two halves that checkpoints shard each on its own."""
        return False

    def forward(self, x_SBD: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        u_SBF, bias = super().forward(x_SBD, *args, **kwargs)
        return scale_features(u_SBF, *getattr(self, self.scale_name)(times=self.width_factor)), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state, scale_prefix = super().sharded_state_dict(prefix, sharded_offsets, metadata), f"{prefix}{self.scale_name}."
        state.pop(f"{scale_prefix}stored", None)  # backends differ in whether they list a submodule's parameters as their own
        return state | getattr(self, self.scale_name).sharded_state_dict(scale_prefix, sharded_offsets, metadata)


class ScaledReadsStream(_ScaledReadsStream):
    """The first linear of an MLP: u <- suv * u * sqrt(D). A gated MLP's output is (gate, up), both scaled.

    Source: MODEL.md "MLP".
    """

    scale_name = "suv"

    @staticmethod
    def splits_halves(config: TransformerConfig) -> bool:
        return config.gated_linear_unit


class MixerReadsStream(_ScaledReadsStream):
    """in_proj of a Mamba mixer: mixer_in_scale * sqrt(D) * (W h), which is z, x, B, C and dt.

    Source: MODEL.md "Mamba-2 mixer".
    """

    scale_name = "mixer_in_scale"

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The scale is cut like the mixer cuts the weight: each of the five parts is sharded over the ranks on its own."""
        state, key = super().sharded_state_dict(prefix, sharded_offsets, metadata), f"{prefix}{self.scale_name}.stored"
        state[key] = _split_tensor_factory(state[key], self.weight.partition_sizes, ["z", "x", "B", "C", "dt"], 0)
        return state


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


class SoleWritesStream(NormalizedWritesStream):
    """The output projection of a sub-block that writes to the stream alone: attention, a dense MLP, a Mamba mixer.

    The residual step takes the length off what the sub-block writes, so that its norm in front of a product in high precision would
    change nothing but rounding. It is computed where the operand matters: where an executor runs the product, in low precision or to look
    at it. Experts' outputs are summed before the step, so theirs is always computed.
    """

    def forward(self, x_SBF: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().forward(x_SBF) if self.is_executed else super(NormalizedWritesStream, self).forward(x_SBF)
