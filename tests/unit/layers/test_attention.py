"""Where tokens stand in their documents, and what a layer that is computed again rotates by."""

import ast
import inspect
import textwrap
from types import SimpleNamespace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import Attention, SelfAttention
from torch import Tensor, nn

from megatron_ext.layers.attention import NormalizedAttention, RotaryAttention, positions_in_documents
from ngpt.functional import split_heads


def test_positions_begin_again_at_each_document():
    boundaries = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    assert positions_in_documents(boundaries, 8).tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert positions_in_documents(boundaries[[0, 3]], 8).tolist() == list(range(8))


class Upstream(nn.Module):
    """Attributes of a layer that upstream's forward would read; two of four ranks' tokens with sequence parallelism."""

    def __init__(self, kind: type, sequence_parallel: bool = False):
        super().__init__()
        self.__class__ = type("Layer", (kind,), {})
        self.world_size, self.config = 2, SimpleNamespace(sequence_parallel=sequence_parallel)
        self.num_attention_heads_per_partition, self.num_query_groups_per_partition = 2, 1
        self.linear_qkv = Gathers()
        self.core_attention = SimpleNamespace(sqk=lambda: (torch.linspace(1, 2, 8), 3.0))


class Gathers(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x.repeat(8 // x.size(0), 1, 1), None


def only_heads(monkeypatch) -> list[dict]:
    """Upstream's forward gives queries, keys and values alone, and notes what else it was told."""
    told: list[dict] = []

    def forward(self, hidden_states, attention_mask, key_value_states=None, **kwargs):
        told.append(kwargs)
        return self.get_query_key_value_tensors(hidden_states, key_value_states, split_qkv=True, output_gate=False)

    monkeypatch.setattr(SelfAttention, "forward", forward)
    return told


def test_each_call_rotates_by_its_own_angles_and_upstream_by_none(monkeypatch):
    told = only_heads(monkeypatch)
    x = torch.randn(8, 1, 16)
    angles = [torch.rand(8, 1, 1, 2).repeat(1, 1, 1, 2) for _ in range(2)]
    layer = Upstream(NormalizedAttention)
    for one in (angles[0], angles[1], angles[0], None):
        wanted = split_heads(x, 2, 1, one, torch.linspace(1, 2, 8), 3.0)
        assert all(map(torch.equal, layer(x, None, rotary_pos_emb=one), wanted))
    assert not any(kwargs.get("rotary_pos_emb") is not None for kwargs in told)


def test_documents_of_a_packed_sequence_begin_at_angle_zero(monkeypatch):
    told = only_heads(monkeypatch)
    angles = torch.arange(5.0)[:, None, None, None].repeat(1, 1, 1, 4)  # of the longest document
    boundaries = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=5, max_seqlen_kv=5)
    x = torch.randn(8, 1, 16)
    own = torch.cat((angles[:3], angles))
    for local, sequence_parallel in ((x, False), (x[:4], True)):
        layer = Upstream(RotaryAttention, sequence_parallel)
        mixed, _ = layer.linear_qkv(local)
        assert all(map(torch.equal, layer(local, None, rotary_pos_emb=angles, packed_seq_params=packed), split_heads(mixed, 2, 1, own)))
    assert all(kwargs["packed_seq_params"] is packed for kwargs in told)


def test_upstream_hands_the_angles_on_and_reads_them_nowhere():
    """They take the place of `key_value_states`, which self-attention has none of."""

    def reads(function) -> int:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        return sum(isinstance(node, ast.Name) and node.id == "key_value_states" for node in ast.walk(tree))

    assert reads(Attention.forward) == 1 and reads(SelfAttention.get_query_key_value_tensors) == 0
    assert "hidden_states,\n                key_value_states,\n                split_qkv" in inspect.getsource(Attention.forward)
