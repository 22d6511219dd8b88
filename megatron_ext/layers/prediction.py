"""Multi-token prediction: how a depth joins the next token's embedding with the hidden state of the previous depth.

Shapes: x_SBD hidden states [sequence, batch, features]; with sequence parallelism the sequence is this rank's part of it.
"""

from collections.abc import Callable

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ngpt.functional import l2_normalize
from ngpt.optim.retraction import mark


class JoinLinear(MegatronModule):
    """eh_proj, [embedding; hidden state] to D features. Every tensor-parallel rank holds the whole [D, 2 * D] weight.

    Megatron's column-parallel layer would cut D. nGPT retracts the weight along D, and normalises each token's output over it. A whole
    weight communicates only to sum its gradient, and needs no more products under sequence parallelism.

    Parallelism: Megatron sums the gradient over the tensor-parallel group where each rank sees part of the tokens, like a router's.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Callable[[Tensor], object], **_):
        super().__init__(config)
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            init_method(self.weight)  # from the random stream that the tensor-parallel ranks share
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x_SBD: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x_SBD, self.weight), None


class NormalizedJoinLinear(JoinLinear):
    """nGPT's eh_proj: its columns live in the residual stream and have unit norm, and so has the state that it starts.

    Source: MODEL.md "Multi-token prediction".
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        mark(self.weight, unit_dim=0)

    def forward(self, x_SBD: Tensor) -> tuple[Tensor, None]:
        y_SBD, _ = super().forward(x_SBD)
        return l2_normalize(y_SBD), None


class PredictionDepth(MultiTokenPredictionLayer):
    """Megatron's layer with a projection that is whole on every rank, so that tensor parallelism gathers and cuts nothing."""

    def _concat_embeddings(self, hidden_states: Tensor, decoder_input: Tensor) -> Tensor:
        return self.eh_proj(torch.cat([self.enorm(decoder_input), self.hnorm(hidden_states)], dim=-1))[0]


def prediction_block(join: type, norm: type) -> ModuleSpec:
    """The spec of all prediction depths; Megatron fills in their layers from the stack's own specs.

    Args:
        join: the projection.
        norm: of the embedding, of the hidden state, and of what leaves the depth.
    """
    parts = MultiTokenPredictionLayerSubmodules(enorm=norm, hnorm=norm, layer_norm=norm, eh_proj=join)
    depth = ModuleSpec(module=PredictionDepth, submodules=parts)
    return ModuleSpec(module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[depth]))
