"""What happens to the logits after the output layer: nGPT's scale sz, and the mask of rows that only pad the vocabulary."""

import torch
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor, nn

from megatron_ext.layers.scale import ParallelScale
from ngpt.functional import scale_features


def logit_scale(hidden_size: int, output_layer: nn.Module) -> ParallelScale:
    """sz: one entry per vocabulary row of this rank. Source: MODEL.md "Logits"."""
    return ParallelScale(
        output_layer.output_size_per_partition,
        init=1.0,
        scale=hidden_size**-0.5,
        tp_group=output_layer.tp_group,
        sharded=True,
        allow_shape_mismatch=True,
    )


def finish_logits(output_layer: nn.Module, sz: ParallelScale | None, vocab_size: int) -> None:
    """Make `output_layer` return scaled logits with padding rows at the lowest finite value, through a forward hook.

    A hook on the layer, rather than on the model, also reaches multi-token prediction heads, which call the same layer.

    Args:
        sz: nGPT's logit scale; None for the GPT control.
        vocab_size: real entries; the layer's rows from there on are padding.
    """
    tp_group, rows = output_layer.tp_group, output_layer.output_size_per_partition
    first, _ = VocabUtility.vocab_range_from_per_partition_vocab_size(rows, tp_group.rank(), tp_group.size())
    real_rows = min(max(vocab_size - first, 0), rows)

    def finish(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        logits_SBV, bias = output
        assert logits_SBV.size(-1) == rows, "gathered logits: call the output layer without gather_output"
        if sz is not None:
            logits_SBV = scale_features(logits_SBV, *sz())
        if real_rows < rows:
            padding = torch.arange(rows, device=logits_SBV.device) >= real_rows
            logits_SBV = logits_SBV.masked_fill(padding, torch.finfo(logits_SBV.dtype).min)
        return logits_SBV, bias

    output_layer.register_forward_hook(finish)
