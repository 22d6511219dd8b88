"""The router of nGPT's mixture-of-experts layers."""

import math

from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ngpt.optim.retraction import leave_free, mark


class NormalizedRouter(TopKRouter):
    """Megatron's top-k router with the logits of x = sqrt(D) * h, or of x = h, in fp32.

    With unit tokens the scores of different experts would differ by less than a step of the expert bias.

    Args:
        scaled_input: x = sqrt(D) * h; the factor is applied to the fp32 logits, where it costs no rounding.
        normalized: keep the rows of the router at unit norm, like those of all matrices that read the stream.

    Source: MODEL.md "Router".
    """

    def __init__(self, config: TransformerConfig, *args, scaled_input: bool, normalized: bool, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.input_factor = math.sqrt(config.hidden_size) if scaled_input else 1.0
        if normalized:
            mark(self.weight, unit_dim=1)
        else:
            leave_free(self.weight)

    def gating(self, input: Tensor) -> Tensor:
        return super().gating(input) * self.input_factor
