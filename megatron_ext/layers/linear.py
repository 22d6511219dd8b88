"""Linear layers of nGPT over any backend's tensor-parallel linears (Megatron's own or Transformer Engine's).

Shapes: x_SBD hidden states [sequence, batch, features]; with sequence parallelism the sequence is this rank's part of it.
"""

import math

from megatron.core.ssm.mamba_mixer import _split_tensor_factory
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.layers.scale import ParallelScale
from ngpt.config.activations import Activation
from ngpt.functional import l2_normalize, scale_features, scaled_activation
from ngpt.optim.retraction import mark


class LocalColumnLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear. Drops the `name` that callers pass and upstream does not accept."""

    def __init__(self, *args, name: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)


class LocalRowLinear(RowParallelLinear):
    """Megatron's row-parallel linear. Drops the `name` that callers pass and upstream does not accept."""

    def __init__(self, *args, name: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)


class ReadsStream:
    """Mixin over a `Quantizable` linear, of one matrix or of all experts of a rank. Its rows live in the residual stream and have unit
    norm, like the tokens that it reads.
    """

    unit_norm_input = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        mark(self.weight, unit_dim=1, num_matrices=self.num_matrices)


class _OwnsScale(ReadsStream):
    """A scale for each output feature, in the submodule called `scale_name`, sharded and saved like the rows of the weight."""

    scale_name: str

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, tp_group, **kwargs):
        super().__init__(input_size, output_size, config=config, tp_group=tp_group, **kwargs)
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
        """Whether the output has two halves that checkpoints shard separately."""
        return False

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state, scale_prefix = super().sharded_state_dict(prefix, sharded_offsets, metadata), f"{prefix}{self.scale_name}."
        state.pop(f"{scale_prefix}stored", None)  # backends differ in whether they list a submodule's parameters as their own
        return state | getattr(self, self.scale_name).sharded_state_dict(scale_prefix, sharded_offsets, metadata)


class ScaledReadsStream(_OwnsScale):
    """The first linear of an MLP: u, raw. It owns suv; `Activates` multiplies by it.

    Source: MODEL.md "MLP".
    """

    scale_name = "suv"

    @staticmethod
    def splits_halves(config: TransformerConfig) -> bool:
        return config.gated_linear_unit


class MixerReadsStream(_OwnsScale):
    """in_proj of a Mamba mixer: mixer_in_scale * sqrt(D) * (W h), which is z, x, B, C and dt.

    Source: MODEL.md "Mamba-2 mixer".
    """

    scale_name = "mixer_in_scale"

    def forward(self, x_SBD: Tensor) -> tuple[Tensor, Tensor | None]:
        u_SBF, bias = super().forward(x_SBD)
        return scale_features(u_SBF, *self.mixer_in_scale(times=math.sqrt(self.config.hidden_size))), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The scale is cut as the mixer cuts the weight: each of the five parts is sharded over the ranks separately."""
        state, key = super().sharded_state_dict(prefix, sharded_offsets, metadata), f"{prefix}{self.scale_name}.stored"
        state[key] = _split_tensor_factory(state[key], self.weight.partition_sizes, ["z", "x", "B", "C", "dt"], 0)
        return state


class WritesStream:
    """Mixin over a `Quantizable` linear, of one matrix or of all experts of a rank. Its columns live in the residual stream and have
    unit norm.

    `operand` makes the input of the product from what the sub-block passes in.

    Attributes:
        computes_norm: whether that input gets unit norm.
    """

    computes_norm = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        mark(self.weight, unit_dim=0, num_matrices=self.num_matrices)

    def forward(self, x_SBF: Tensor, *sizes: list[int]) -> tuple[Tensor, Tensor | None]:
        return super().forward(self.operand(x_SBF, *sizes), *sizes)

    def operand(self, x_SBF: Tensor, *sizes: list[int]) -> Tensor:
        """The input of the product. `sizes`: tokens of each expert, which lie one after the other."""
        return l2_normalize(x_SBF, group=self.feature_group) if self.computes_norm else x_SBF


class NormalizedWritesStream(WritesStream):
    """Fine-grained normalisation: the input of the output projection has unit norm over all its features.

    Parallelism: the features are split over the tensor-parallel group; their sum of squares is all-reduced over it, forward and backward.
    Source: MODEL.md "Fine-grained"; arXiv 2605.06067.
    """

    unit_norm_input = True
    computes_norm = True


class SoleWritesStream(NormalizedWritesStream):
    """The output projection of a sub-block that writes to the stream alone: attention, a dense MLP, a Mamba mixer.

    The residual step removes the length of what the sub-block writes. In front of a high-precision product this norm would change nothing
    but rounding. It is computed where the operand matters: where an executor runs the product, in low precision or to look at it.
    Experts' outputs are summed before the step, so their norm is always computed.
    """

    @property
    def computes_norm(self) -> bool:
        return self.is_executed


class Activates:
    """Mixin over the output projection of an MLP or of experts, which reads the raw u of the first linear.

    Its operand is activation(suv * u * sqrt(D)), normalised where that is computed. One kernel makes it and keeps only u. What
    Megatron calls the activation, between the two linears, is the identity.

    Args:
        activation: what is computed.
    """

    def __init__(self, *args, config: TransformerConfig, activation: Activation, **kwargs):
        super().__init__(*args, config=config, **kwargs)
        self.activation, self.width_factor = activation, math.sqrt(config.hidden_size)

    def borrow(self, suv: ParallelScale) -> None:
        """Take the scale, which belongs to the first linear or to all experts of a layer."""
        self.borrowed = (suv,)  # in a tuple, so that it does not become a submodule of this linear

    def operand(self, u_SBF: Tensor, *sizes: list[int]) -> Tensor:
        stored, factor = self.borrowed[0](times=self.width_factor)
        return scaled_activation(
            u_SBF,
            stored,
            factor,
            function=self.activation.function,
            gated=self.activation.gated,
            normalize=self.computes_norm,
            group=self.feature_group,
            sizes=sizes[0] if stored.dim() == 2 else None,
        )


class LendsScale:
    """Mixin over Megatron's MLP: lends suv, which the first linear owns, to the second, which multiplies its input by it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.linear_fc2.borrow(self.linear_fc1.suv)
