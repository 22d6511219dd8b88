"""Core attention of nGPT, and a local attention that works under context parallelism.

Shapes: q_SBNK queries, k_SBGK and v_SBGK keys and values [sequence, batch, heads of this rank, head dimension].
"""

import copy
import math

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.layers.scale import ParallelScale
from ngpt.functional import l2_normalize, scaled_l2_normalize


class NormalizedAttention(MegatronModule):
    """q <- sqk^2 * l2_normalize(q), k <- l2_normalize(k), then attention with softmax scale sqrt(K).

    Called with queries and keys after the rotary embedding, in Megatron's `core_attention` slot. Scaling the queries by sqk^2 equals
    scaling queries and keys by sqk each, and stays right where several query heads share a key head.

    Args:
        inner: the backend's core attention class.

    Parallelism: sqk is sharded over the heads like the queries.

    Source: MODEL.md "Attention".
    """

    def __init__(self, config: TransformerConfig, *, inner: type, pg_collection, softmax_scale: float | None = None, **kwargs):
        super().__init__(config)
        assert softmax_scale is None, "nGPT states its own softmax scale"
        self.inner = inner(config=config, softmax_scale=math.sqrt(config.kv_channels), pg_collection=pg_collection, **kwargs)
        heads = config.num_attention_heads // pg_collection.tp.size()
        self.sqk = ParallelScale(
            heads * config.kv_channels, init=1.0, scale=config.hidden_size**-0.5, tp_group=pg_collection.tp, sharded=True
        )

    def forward(self, q_SBNK: Tensor, k_SBGK: Tensor, v_SBGK: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        sqk, factor = self.sqk()
        q_SBNK = scaled_l2_normalize(q_SBNK, sqk.view(q_SBNK.shape[-2:]), factor, squared=True)
        return self.inner(q_SBNK, l2_normalize(k_SBGK), v_SBGK, attention_mask, **kwargs)


class LocalAttention(DotProductAttention):
    """Megatron's unfused attention; under context parallelism keys and values are gathered over the context group.

    Megatron gives context rank r of c the sequence chunks r and 2c - 1 - r of 2c, so that causal work is balanced: the mask
    follows that order.

    Parallelism: all-gathers K and V over the context-parallel group, reduce-scatters their gradients.
    """

    def __init__(self, config: TransformerConfig, *args, pg_collection, **kwargs):
        whole = copy.copy(config)
        whole.context_parallel_size = 1  # upstream asserts it; the gather below makes it true
        super().__init__(whole, *args, pg_collection=pg_collection, **kwargs)
        self.cp_group = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if size > 1:
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
            positions = zigzag_positions(query.size(0), size, query.device)
            attention_mask = (positions.flatten()[None, :] > positions[rank][:, None])[None, None]
        return super().forward(query, key, value, attention_mask, **kwargs)


def zigzag_positions(tokens_per_rank: int, context_size: int, device: torch.device) -> Tensor:
    """[context_size, tokens_per_rank] int64: the sequence positions that each context-parallel rank holds, in its order."""
    chunks = torch.arange(tokens_per_rank * context_size, device=device).view(2 * context_size, -1)
    return torch.stack([torch.cat([chunks[rank], chunks[-1 - rank]]) for rank in range(context_size)])
