"""Figures of the health panel that do not need a run."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from megatron_ext.training import health


def router(layer_number: int, load: list[float]) -> TopKRouter:
    found = TopKRouter.__new__(TopKRouter)
    nn.Module.__init__(found)
    found.layer_number, found.load = layer_number, torch.tensor(load)
    return found


def test_routers_of_prediction_depths_have_loads_of_their_own(monkeypatch: pytest.MonkeyPatch):
    """Megatron counts the layers of every depth from 1 again."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(health.dist, "all_reduce", lambda tensor: None)
    chunk = nn.Module()
    chunk.config = SimpleNamespace(num_layers=3, num_moe_experts=2, mtp_num_layers=2)
    chunk.mtp_pattern, chunk.decoder, chunk.mtp = "*E", nn.Module(), nn.Module()
    chunk.decoder.layers = nn.ModuleList([router(2, [1.0, 2.0])])
    chunk.mtp.layers = nn.ModuleList([nn.ModuleDict({"mtp_model_layer": router(2, load)}) for load in ([3.0, 4.0], [5.0, 6.0])])
    assert health.expert_loads([chunk]).tolist() == [[0, 0], [1, 2], [0, 0], [0, 0], [3, 4], [0, 0], [5, 6]]
