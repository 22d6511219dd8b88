"""Self-attention that makes queries, keys and values in one pass, and the core attentions under it.

Shapes: q_SBNK queries, k_SBGK and v_SBGK keys and values [sequence, batch, heads of this rank, head dimension].
"""

import copy
import math

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.layers.scale import ParallelScale
from ngpt.functional import split_heads


class RotaryAttention(SelfAttention):
    """Megatron's self-attention, with queries and keys rotated in the pass that takes them out of linear_qkv's output.

    Parallelism: heads are sharded as upstream shards them, whole groups to a rank; the angles are those of this context-parallel rank.
    """

    def __init__(self, config: TransformerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        assert config.num_query_groups >= self.world_size, "a group's key and value would be split over ranks"
        assert not (config.rotary_interleaved or config.no_rope_freq or config.attention_output_gate), "not in the pass"
        assert self._yarn_concentration_factor == 1.0, "the rotation changes no length"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: object = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """As upstream's; the angles [S, 1, 1, R] go to `get_query_key_value_tensors`, and upstream rotates nothing."""
        assert inference_context is None, "a cache would hold keys that are rotated already"
        angles = rotary_pos_emb
        if angles is not None and packed_seq_params is not None:
            tokens = hidden_states.size(0) * (self.world_size if self.config.sequence_parallel else 1)
            angles = _angles_in_documents(angles, packed_seq_params, tokens)
        # Upstream passes `key_value_states` on without reading it. An attribute would hold another micro-batch's angles when this one is
        # recomputed.
        return super().forward(hidden_states, attention_mask, key_value_states=angles, packed_seq_params=packed_seq_params, **kwargs)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, output_gate: bool = False, split_qkv: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q_SBNK, k_SBGK and v_SBGK for core attention; key_value_states are the angles."""
        mixed_SBM, _ = self.linear_qkv(hidden_states)
        heads, groups = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
        return split_heads(mixed_SBM, heads, groups, key_value_states, *self.query_scale())

    def query_scale(self) -> tuple[Tensor | None, float]:
        """The stored scale of the queries, and the factor that gives its value; None: queries and keys are not normalised."""
        return None, 1.0


class NormalizedAttention(RotaryAttention):
    """q <- sqk^2 * l2_normalize(q), k <- l2_normalize(k), in the pass that rotates them.

    Scaling the queries by sqk^2 equals scaling queries and keys by sqk each, and stays right where several query heads share a key head.

    Source: MODEL.md "Attention".
    """

    def query_scale(self) -> tuple[Tensor, float]:
        return self.core_attention.sqk()


class ScaledCore(MegatronModule):
    """The backend's core attention with softmax scale sqrt(K); sqk lives here, where checkpoints have it.

    Args:
        inner: the backend's core attention class.

    Parallelism: sqk is sharded over the heads like the queries.
    """

    def __init__(self, config: TransformerConfig, *, inner: type, pg_collection, softmax_scale: float | None = None, **kwargs):
        super().__init__(config)
        assert softmax_scale is None, "nGPT states its own softmax scale"
        self.inner = inner(config=config, softmax_scale=math.sqrt(config.kv_channels), pg_collection=pg_collection, **kwargs)
        heads = config.num_attention_heads // pg_collection.tp.size()
        self.sqk = ParallelScale(
            heads * config.kv_channels, init=1.0, scale=config.hidden_size**-0.5, tp_group=pg_collection.tp, sharded=True
        )

    def forward(self, *args, **kwargs) -> Tensor:
        return self.inner(*args, **kwargs)


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


def _angles_in_documents(angles: Tensor, packed: PackedSeqParams, tokens: int) -> Tensor:
    """[tokens, 1, 1, R]: angles of each token's position in its document; one tensor for all layers, kept in the micro-batch's packing."""
    known = getattr(packed, "angles_in_documents", None)
    if known is None or known[0] is not angles:
        known = angles, angles.index_select(0, positions_in_documents(packed.cu_seqlens_q, tokens))
        packed.angles_in_documents = known
    return known[1]


def positions_in_documents(boundaries: Tensor, tokens: int) -> Tensor:
    """[tokens]: each token's position in its document. Documents begin at boundaries [documents + 1]; both are int32."""
    token = torch.arange(tokens, dtype=boundaries.dtype, device=boundaries.device)
    return token - boundaries[torch.searchsorted(boundaries, token, right=True) - 1]
