"""The forward step that Megatron's schedules call: one micro-batch in, its loss out."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from torch import Tensor

from megatron_ext.training.data import to_device

LOSS_NAME = "lm loss"  # Megatron's key: its log line and its validation scalar are named after it
_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def masked_loss(loss_mask_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the token losses and their number, as Megatron's schedules want them.

    Args:
        loss_mask_BS: fp32, 1 where a token counts.
        losses_BS: cross entropies in nats.

    Returns:
        (sum in nats, tokens int32, report): the report's [sum, tokens] is summed over micro-batches and data-parallel ranks by
        Megatron, so that the logged loss is the mean over all tokens of the step.
    """
    mask = loss_mask_BS.reshape(-1).float()
    total = torch.sum(losses_BS.reshape(-1).float() * mask)
    tokens = mask.sum()
    return total, tokens.to(torch.int), {LOSS_NAME: torch.stack([total.detach(), tokens])}


def document_boundaries(batch: dict[str, Tensor]) -> PackedSeqParams | None:
    """Where the documents of a sequence begin and end, for attention that is confined to them; None where the batch does not say.

    The dataset pads the boundaries [1, S + 1] with the sequence length. Read on the CPU, where the batch still is.
    """
    if "cu_seqlens" not in batch:
        return None
    boundaries = torch.unique_consecutive(batch["cu_seqlens"][0])
    longest = int(boundaries.diff().max())
    boundaries = boundaries.to(torch.cuda.current_device(), dtype=torch.int32, non_blocking=True)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=longest, max_seqlen_kv=longest)


def forward_step(batches: Iterator[dict[str, Tensor]] | None, model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Run this pipeline stage on the next micro-batch.

    Every stage reads the batch: the first needs its tokens, the last its labels, and all of them the documents' boundaries.

    Returns:
        (output tensor, function of it that gives `masked_loss`).
    """
    batch = next(batches)
    packed = document_boundaries(batch)
    keys = (*_KEYS, "attention_mask") if "attention_mask" in batch else _KEYS
    batch = to_device(batch, keys)
    cp_group = get_attr_wrapped_model(model, "pg_collection").cp
    if cp_group.size() > 1:
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)
    inputs = batch["tokens"], batch["position_ids"], batch.get("attention_mask")
    # Prediction depths use labels and mask inside the model, and add their losses to the gradients alone.
    output = model(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"], packed_seq_params=packed)
    return output, partial(masked_loss, batch["loss_mask"])
