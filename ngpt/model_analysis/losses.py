"""Losses of individual held-out sequences, so that two states of a model are compared on the same text."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ngpt.hf.modeling_ngpt import NGPTForCausalLM

TOKENS_AT_ONCE = 8192  # in a forward pass through the layers
LOGITS_AT_ONCE = 1024  # tokens


@torch.no_grad()
def sequence_losses(
    model: NGPTForCausalLM, ids_NS: Tensor, at_once: int | None = None, tick: Callable[[int], None] | None = None
) -> Tensor:
    """The mean loss of each sequence in nats per token, fp64 [N] on the CPU.

    Args:
        ids_NS: [N, S + 1], on any device; the last token is only predicted.
        at_once: sequences per forward pass; None: as many as `TOKENS_AT_ONCE` allows.
        tick: called with the number of sequences done.
    """
    at_once = at_once or max(1, TOKENS_AT_ONCE // (ids_NS.size(1) - 1))
    found: list[Tensor] = []
    for ids_BS in ids_NS.split(at_once):
        ids_BS = ids_BS.to(model.device)
        h_BSD = model.model(ids_BS[:, :-1], use_cache=False).last_hidden_state
        found.append(token_losses(model, h_BSD, ids_BS[:, 1:]).double().mean(dim=1).cpu())
        if tick:
            tick(sum(map(len, found)))
    return torch.cat(found)


def token_losses(model: NGPTForCausalLM, h_BSD: Tensor, targets_BS: Tensor) -> Tensor:
    """Cross entropy of each token, [B, S] in fp32 or better, from the stream after the last norm."""
    parts = zip(h_BSD.flatten(0, 1).split(LOGITS_AT_ONCE), targets_BS.flatten().split(LOGITS_AT_ONCE), strict=True)
    return torch.cat([F.cross_entropy(model.logits(h_TD), target_T, reduction="none") for h_TD, target_T in parts]).view_as(targets_BS)
