"""The loss of a multi-token prediction depth is a mean over whole sequences, and its logits are used for nothing else.

Upstream (megatron-core 0.19.2), `core/transformer/multi_token_prediction.py: process_mtp_loss`
- divides each context-parallel rank's losses by the number of tokens that this rank keeps. The ranks keep different numbers, since a depth
  has no label at the end of a sequence, so that the gradient differs from that of one process;
- looks for the largest of the logits, to count the tokens that a draft would get right; here they are not scaled yet (`LogitHead`);
- makes labels of the next tokens where there are none, in a text that is sampled or analysed.
Reason: a model with prediction depths trains alike over any number of context-parallel ranks, and its logits are read once. What Megatron
reports as a depth's acceptance rate is 0.
Goes when: upstream sums the numbers of tokens over the context-parallel group and leaves the rest to a switch.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor


def install() -> bool:
    """Wraps the function where the model finds it."""
    from megatron.core.models.hybrid import hybrid_model

    if not hasattr(hybrid_model.process_mtp_loss, "__wrapped__"):
        hybrid_model.process_mtp_loss = functools.wraps(hybrid_model.process_mtp_loss)(process_mtp_loss)
    return True


def process_mtp_loss(
    *,
    cp_group: dist.ProcessGroup,
    labels: Tensor | None,
    hidden_states: Tensor,
    loss_mask: Tensor,
    output_layer: Callable,
    output_weight: Tensor | None,
    runtime_gather_output: bool | None,
    is_training: bool,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    config: Any,
    tp_group: dist.ProcessGroup,
    input_ids: Tensor | None,
    packed_seq_params: Any,
    scale_logits_fn: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The model's own part of `hidden_states`, whose gradient brings the depths' losses with it.

    Args:
        hidden_states: [(1 + depths) * S, B, D], the model's and each depth's.
        labels, loss_mask: [B, S] of this rank. Without labels the depths' logits are computed, for hooks on the output layer to see.

    Parallelism: one number all-reduced over the context-parallel group for each depth, and the labels' boundaries exchanged.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper, roll_tensor

    assert config.calculate_per_token_loss and packed_seq_params is None and scale_logits_fn is None  # the config's checks refuse both
    own, *depths = hidden_states.chunk(1 + config.mtp_num_layers)
    if labels is None:
        for hidden in depths:
            output_layer(hidden, weight=output_weight, runtime_gather_output=runtime_gather_output)
        return own
    tokens = _sum(loss_mask, cp_group)  # what the whole gradient is divided by
    for depth, hidden in enumerate(depths):
        labels, loss_mask = (roll_tensor(x, cp_group=cp_group)[0] for x in (labels, loss_mask))
        logits, _ = output_layer(hidden, weight=output_weight, runtime_gather_output=runtime_gather_output)
        losses = loss_mask * compute_language_model_loss(labels, logits)
        kept = _sum(loss_mask, cp_group).clamp(min=1)
        if is_training:
            mean = losses.detach().sum() * cp_group.size() / kept  # reported as the average over ranks
            group, none = parallel_state.get_data_parallel_group(with_context_parallel=True), kept.new_zeros(())
            MTPLossLoggingHelper.save_metrics_to_tracker(mean, none, none, depth, len(depths), avg_group=group)
        own = MTPLossAutoScaler.apply(own, config.mtp_loss_scaling_factor / len(depths) * losses * (tokens / kept))
    return own


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.sum()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total
