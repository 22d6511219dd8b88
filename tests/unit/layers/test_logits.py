"""Where the logits of a model go: to the loss as they are, to whoever has no labels scaled and masked."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor, nn

from megatron_ext.layers import logits
from megatron_ext.layers.logits import LogitHead

WIDTH, REAL, RANKS = 6, 9, 4  # 16 rows of 4 a rank: the third has one real row, the fourth none
SEQUENCE, BATCH, FACTOR = 5, 2, 1.5


class Head(nn.Module):
    """An output layer of one rank of the vocabulary."""

    def __init__(self, rank: int):
        super().__init__()
        self.tp_group = SimpleNamespace(rank=lambda: rank, size=lambda: RANKS)
        self.output_size_per_partition = 16 // RANKS
        whole = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1))
        self.weight = nn.Parameter(whole.chunk(RANKS)[rank])

    def forward(self, hidden_SBD: Tensor) -> tuple[Tensor, None]:
        return hidden_SBD @ self.weight.t(), None


class Model(nn.Module):
    """Calls its output layer and its loss as Megatron's does."""

    def __init__(self, rank: int, is_scaled: bool):
        super().__init__()
        self.output_layer = Head(rank)
        self.sz = nn.Module()
        self.sz.stored = nn.Parameter(torch.arange(1.0, 17).chunk(RANKS)[rank])
        LogitHead(self, (lambda: (self.sz.stored, FACTOR)) if is_scaled else None, REAL)

    def forward(self, tokens, position_ids, attention_mask, decoder_input=None, labels=None):
        hidden = torch.randn(SEQUENCE, BATCH, WIDTH, generator=torch.Generator().manual_seed(2))
        found, _ = self.output_layer(hidden)
        return found.transpose(0, 1) if labels is None else self.compute_language_model_loss(labels, found)


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(REAL, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[True, False], ids=["ngpt", "control"])
def models(request) -> list[Model]:
    return [Model(rank, request.param) for rank in range(RANKS)]


def whole_logits(models: list[Model]) -> Tensor:
    """[B, S, 9] fp64 of the definition."""
    hidden = torch.randn(SEQUENCE, BATCH, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    weight = torch.cat([model.output_layer.weight for model in models]).double()
    found = (hidden @ weight.t()).transpose(0, 1)
    scale = torch.cat([model.sz.stored for model in models]).double() * FACTOR
    is_scaled = models[0](None, None, None).abs().max() > found.abs().max()
    return (found * scale if is_scaled else found)[..., :REAL]


def test_without_labels_the_logits_are_scaled_and_padding_has_no_probability(models, labels, monkeypatch):
    monkeypatch.setattr(logits, "scaled_cross_entropy", lambda x, *_, **__: x[..., 0])
    for model in models:
        model(None, None, None, labels=labels)  # leaves nothing behind
    whole = torch.cat([model(None, None, None) for model in models], -1).double()
    torch.testing.assert_close(whole[..., :REAL], whole_logits(models).detach(), rtol=0, atol=6 * 50 * 2**-24)
    assert (whole[..., REAL:] == torch.finfo(torch.float32).min).all()


def test_with_labels_every_rank_hands_its_part_to_one_loss(models, labels, monkeypatch):
    """Each rank's part of a partition sum and of the target's logit, put together here."""
    parts = []

    def keep(logits_SBV, targets_SB, scale=None, factor=1.0, *, columns, group):
        scaled = (logits_SBV if scale is None else logits_SBV * scale * factor)[..., :columns].double()
        here = (targets_SB >= 0) & (targets_SB < columns)
        picked = torch.zeros(targets_SB.shape, dtype=torch.float64)
        picked[here] = scaled[here].gather(1, targets_SB[here][:, None])[:, 0]
        parts.append((scaled.exp().sum(-1), picked))
        return picked

    monkeypatch.setattr(logits, "scaled_cross_entropy", keep)
    for model in models:
        assert model(None, None, None, None, labels).shape == labels.shape
    losses = (sum(total for total, _ in parts).log() - sum(picked for _, picked in parts)).t()
    wanted = nn.functional.cross_entropy(whole_logits(models).flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    # Logits of up to 50 in fp32, sums of 6 products: a rounding each.
    torch.testing.assert_close(losses, wanted, rtol=0, atol=6 * 50 * 2**-24)


def test_scaled_logits_are_no_input_of_the_loss(models, labels):
    found = models[0](None, None, None)
    with pytest.raises(AssertionError, match="without labels"):
        models[0].compute_language_model_loss(labels, found)


def test_upstream_still_takes_the_labels_there_and_calls_the_loss_so():
    assert list(inspect.signature(HybridModel.forward).parameters)[1 + logits._LABELS] == "labels"  # behind self
    source = inspect.getsource(HybridModel.forward)
    assert "self.compute_language_model_loss(labels, logits)" in source
    assert source.index("self.output_layer(") < source.index("if labels is None:")
