"""The residual step of nGPT in Megatron's bias-dropout-add slot."""

from collections.abc import Callable

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.layers.scale import ParallelScale
from ngpt.functional import lerp_retract


class NormalizedResidual(MegatronModule):
    """h <- lerp_retract(h, sub-block output, alpha), owning the sub-block's eigen learning rates.

    Megatron calls a layer's `*_bda` as `bda(training, fused)(output_with_bias, residual, dropout)`; sub-blocks that a layer lacks
    keep Megatron's identity there and take no step.

    Source: MODEL.md "Residual step".
    """

    def __init__(self, config: TransformerConfig, alpha_init: float, tp_group):
        super().__init__(config)
        self.alpha = ParallelScale(
            config.hidden_size,
            init=alpha_init,
            scale=config.hidden_size**-0.5,
            tp_group=tp_group,
            sequence_parallel=config.sequence_parallel,
        )

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        def step(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            assert bias is None and dropout == 0.0, "nGPT has neither biases nor dropout"
            return lerp_retract(residual, output, *self.alpha())

        return step


class SharedInput(IdentityOp):
    """Replaces the norm in front of experts: passes on the stream as a separate tensor of autograd's graph.

    Router, routed and shared experts all read it. Their gradients are summed here before the residual step's is added, in the order that
    recomputation has. Otherwise recomputing the experts would change the last bits of a gradient.
    """

    def forward(self, x_SBD: Tensor) -> Tensor:
        return x_SBD.view_as(x_SBD)
