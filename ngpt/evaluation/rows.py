"""Rows of tokens whose last ones are scored: how they form batches, and what logits say about them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

TOKENS_AT_A_TIME = 2048  # tokens whose logits are held in fp32 at once


@dataclass(frozen=True)
class Row:
    """Tokens, the last `scored` of which are predicted from those before them. At least one token comes before them."""

    tokens: tuple[int, ...]
    scored: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token, which is only predicted."""
        return self.tokens[:-1]

    @property
    def targets(self) -> tuple[int, ...]:
        return self.tokens[-self.scored :]


@dataclass(frozen=True)
class Reading:
    """A text that the model reads once, and all rows that this reading scores. Choices of one token each differ only in their target.

    Attributes:
        rows: Number of each row among all that are scored, and its targets: the tokens that follow the last inputs.
    """

    inputs: tuple[int, ...]
    rows: tuple[tuple[int, tuple[int, ...]], ...]


def readings(rows: Sequence[Row]) -> list[Reading]:
    """What has to be read to score some rows, the longest first. So batches have little padding, and a lack of memory shows at once."""
    of_inputs: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for number, row in enumerate(rows):
        assert 0 < row.scored < len(row.tokens), f"row {number}: {row.scored} scored of {len(row.tokens)} tokens"
        of_inputs.setdefault(row.inputs, []).append((number, row.targets))
    made = [Reading(inputs, tuple(found)) for inputs, found in of_inputs.items()]
    return sorted(made, key=lambda reading: len(reading.inputs), reverse=True)


def batches(found: Sequence[Reading], size: int, rank: int = 0, ranks: int = 1) -> list[Sequence[Reading]]:
    """The batches of one of several ranks. All ranks get the same number (the last may be empty) and a fair share of the lengths."""
    cut = [found[first : first + size] for first in range(0, len(found), size)]
    cut += [()] * (-len(cut) % ranks)
    return cut[rank::ranks]


def padded(batch: Sequence[Reading], length: int, rows: int) -> Tensor:
    """Inputs of a batch, padded at the end with token 0, which a causal model does not see from earlier tokens.

    Returns:
        int64 [rows, length].
    """
    ids_BS = torch.zeros(rows, length, dtype=torch.long)
    for row, reading in enumerate(batch):
        ids_BS[row, : len(reading.inputs)] = torch.tensor(reading.inputs)
    return ids_BS


def add_scores(
    scores_R2: Tensor, batch: Sequence[Reading], logits_BSV: Tensor, first: int = 0, group: dist.ProcessGroup | None = None
) -> None:
    """Writes the scores that a batch's logits give its rows.

    Args:
        scores_R2: float64, of all rows: the sum of the scored tokens' log-probabilities in nats, and how many of them are not the most
            probable one.
        logits_BSV: of `padded` inputs, any float type; with a group this rank's part of the vocabulary, from entry `first` on.

    Parallelism: for every `TOKENS_AT_A_TIME` tokens four all-reduces over `group`, of one number a token.
    """
    places = [
        (row, len(reading.inputs) - len(targets) + offset, target, number)
        for row, reading in enumerate(batch)
        for number, targets in reading.rows
        for offset, target in enumerate(targets)
    ]
    for start in range(0, len(places), TOKENS_AT_A_TIME):
        row_T, position_T, target_T, number_T = torch.tensor(places[start : start + TOKENS_AT_A_TIME], device=logits_BSV.device).unbind(1)
        log_probability_T, best_T = predicted(logits_BSV[row_T, position_T], target_T, first, group)
        found_T2 = torch.stack([log_probability_T.double(), (best_T != target_T).double()], dim=1)
        scores_R2.index_add_(0, number_T.to(scores_R2.device), found_T2.to(scores_R2.device))


def predicted(logits_TV: Tensor, target_T: Tensor, first: int = 0, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """(fp32 log-probability of each target in nats, the entry of the largest logit: the first one where several are).

    Args:
        logits_TV: with a group this rank's part of the vocabulary, from entry `first` on.
    """

    def over_ranks(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if group is not None and group.size() > 1:
            dist.all_reduce(tensor, op=operation, group=group)
        return tensor

    logits_TV = logits_TV.float()
    own_T, place_T = logits_TV.max(dim=1)
    largest_T = over_ranks(own_T.clone(), dist.ReduceOp.MAX)
    nobody = torch.iinfo(torch.long).max
    best_T = over_ranks(torch.where(own_T == largest_T, place_T + first, nobody), dist.ReduceOp.MIN)
    total_T = over_ranks((logits_TV - largest_T[:, None]).exp().sum(dim=1), dist.ReduceOp.SUM)
    local_T = target_T - first
    is_here_T = (local_T >= 0) & (local_T < logits_TV.size(1))
    chosen_T = logits_TV.gather(1, local_T.clamp(0, logits_TV.size(1) - 1)[:, None]).squeeze(1)
    chosen_T = over_ranks(torch.where(is_here_T, chosen_T, 0.0), dist.ReduceOp.SUM)
    return chosen_T - largest_T - total_T.log(), best_T


def answers(scores_R2: Tensor) -> list[tuple[float, bool]]:
    """(sum of log-probabilities, whether each scored token is the most probable one) of each row, of `add_scores`."""
    return [(score, others == 0) for score, others in scores_R2.tolist()]
