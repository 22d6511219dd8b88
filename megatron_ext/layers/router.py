"""The routers of mixture-of-experts layers."""

import math
from collections.abc import Callable

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ngpt.optim.retraction import leave_unretracted, mark


class _SortedSelection:
    """Takes the place of Megatron's replay of recorded selections, the one hook around its top-k."""

    def get_replay_topk(self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, select: Callable) -> tuple:
        with torch.enable_grad():  # upstream sorts only then; scores computed without gradients still have none
            return select(scores, topk, num_groups, group_topk)


class SortedRouter(TopKRouter):
    """Megatron's top-k router, with a token's experts sorted by score whether gradients are taken or not.

    Megatron sorts them only with gradients, and a recomputed layer first runs without. The probabilities of a token are divided by a sum
    over its experts. Unsorted, they would differ in the last bit from those of a layer that is not recomputed.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.router_replay is None:
            self.router_replay = _SortedSelection()


class NormalizedRouter(SortedRouter):
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
            leave_unretracted(self.weight)

    def gating(self, input: Tensor) -> Tensor:
        return super().gating(input) * self.input_factor
