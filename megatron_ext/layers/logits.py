"""What happens to the logits after the output layer: nGPT's scale sz, the mask of rows that only pad the vocabulary, and the loss."""

import torch
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor, nn

from megatron_ext.layers.scale import ParallelScale
from ngpt.config.schema import ModelConfig
from ngpt.functional import scale_features, scaled_cross_entropy

_LABELS = 4  # position of the labels among the arguments of Megatron's models


def logit_scale(model: ModelConfig, output_layer: nn.Module) -> ParallelScale:
    """sz: one entry per vocabulary row of this rank. Source: MODEL.md "Logits"."""
    return ParallelScale(
        output_layer.output_size_per_partition,
        init=model.sz_init,
        scale=model.hidden_size**-0.5,
        tp_group=output_layer.tp_group,
        sharded=True,
        allow_shape_mismatch=True,
    )


class LogitHead:
    """Takes over the logits of a model. If a loss follows, one function makes it from what the output layer returns. Otherwise the output
    layer returns scaled logits with padding rows at the lowest finite value.

    Hooks on the output layer, rather than on the model, also reach multi-token prediction heads, which call the same layer.

    Args:
        model: a Megatron language model with an output layer; a loss follows if its `forward` gets labels.
        sz: nGPT's logit scale; None for the GPT control.
        vocab_size: real entries; the layer's rows from there on are padding.
    """

    def __init__(self, model: nn.Module, sz: ParallelScale | None, vocab_size: int):
        layer = model.output_layer
        self._group, self._rows = layer.tp_group, layer.output_size_per_partition
        self._first, _ = VocabUtility.vocab_range_from_per_partition_vocab_size(self._rows, self._group.rank(), self._group.size())
        self._real_rows = min(max(vocab_size - self._first, 0), self._rows)
        self._sz, self._loss_follows = sz, False
        model.register_forward_pre_hook(self._look_for_labels, with_kwargs=True)
        layer.register_forward_hook(self._finish)
        model.compute_language_model_loss = self.losses

    def losses(self, labels_BS: Tensor, logits_SBV: Tensor) -> Tensor:
        """Cross entropies [B, S] fp32 of the output layer's own logits, in nats.

        Args:
            labels_BS: int64 entries of the vocabulary. The loss of any other label is the logits' logsumexp, for masked tokens only.
            logits_SBV: this rank's part of the vocabulary; overwritten in the backward pass.
        """
        assert self._loss_follows, "the logits are scaled: the model was called without labels"
        scale = () if self._sz is None else self._sz()
        targets_SB = labels_BS.t() - self._first
        return scaled_cross_entropy(logits_SBV, targets_SB, *scale, columns=self._real_rows, group=self._group).t().contiguous()

    def _look_for_labels(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._loss_follows = (args[_LABELS] if len(args) > _LABELS else kwargs.get("labels")) is not None

    def _finish(self, module: nn.Module, args: tuple, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        logits_SBV, bias = output
        assert logits_SBV.size(-1) == self._rows, "gathered logits: call the output layer without gather_output"
        if self._loss_follows:
            return logits_SBV, bias
        if self._sz is not None:
            logits_SBV = scale_features(logits_SBV, *self._sz())
        if self._real_rows < self._rows:
            padding = torch.arange(self._rows, device=logits_SBV.device) >= self._real_rows
            logits_SBV = logits_SBV.masked_fill(padding, torch.finfo(logits_SBV.dtype).min)
        return logits_SBV, bias
