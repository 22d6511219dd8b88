"""What the forward step hands to the model."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_ext.training import step


class Model(nn.Module):
    """Remembers what it was called with."""

    pg_collection = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))

    def forward(self, *args, **kwargs) -> torch.Tensor:
        self.seen = kwargs
        return torch.ones(1, 4)


def test_the_mask_of_the_loss_reaches_the_prediction_depths(monkeypatch: pytest.MonkeyPatch):
    """They form their losses inside the model, so that a mask applied to its output alone would miss them."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    tokens, mask = torch.arange(4)[None], torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    batch = {"tokens": tokens, "labels": tokens + 1, "loss_mask": mask, "position_ids": tokens}
    model = Model()
    output, loss = step.forward_step(iter([batch]), model)
    assert torch.equal(model.seen["loss_mask"], mask) and torch.equal(model.seen["labels"], tokens + 1)
    assert loss(output)[0] == 3
