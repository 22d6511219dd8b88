"""Rows of tokens of which the last ones are scored: how they make batches, and what logits say of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

TOKENS_AT_A_TIME = 2048  # whose logits are looked at in fp32


@dataclass(frozen=True)
class Row:
    """Tokens, the last `scored` of which are predicted from those before them. There is one before them at least."""

    tokens: tuple[int, ...]
    scored: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: the last token is only predicted."""
        return self.tokens[:-1]

    @property
    def targets(self) -> tuple[int, ...]:
        return self.tokens[-self.scored :]


@dataclass(frozen=True)
class Reading:
    """A text that the model reads once, and the rows that are scored by what it says: choices of one token differ in their target only.

    Attributes:
        rows: Numbers of the rows among all that are scored, with each its targets, which stand for the last inputs.
    """

    inputs: tuple[int, ...]
    rows: tuple[tuple[int, tuple[int, ...]], ...]


def readings(rows: Sequence[Row]) -> list[Reading]:
    """What has to be read to score some rows, the longest first: a batch then has little padding, and too little memory shows at once."""
    of_inputs: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for number, row in enumerate(rows):
        assert 0 < row.scored < len(row.tokens), f"row {number}: {row.scored} scored of {len(row.tokens)} tokens"
        of_inputs.setdefault(row.inputs, []).append((number, row.targets))
    made = [Reading(inputs, tuple(found)) for inputs, found in of_inputs.items()]
    return sorted(made, key=lambda reading: len(reading.inputs), reverse=True)


def batches(found: Sequence[Reading], size: int, rank: int = 0, ranks: int = 1) -> list[Sequence[Reading]]:
    """The batches of one of several ranks: all have the same number, the last ones may be empty, and the lengths are shared out evenly."""
    cut = [found[first : first + size] for first in range(0, len(found), size)]
    cut += [()] * (-len(cut) % ranks)
    return cut[rank::ranks]


def padded(batch: Sequence[Reading], length: int, rows: int) -> Tensor:
    """Inputs of a batch, padded behind their end with token 0, which causal models do not look at.

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
    """Writes what a batch's logits say of its rows.

    Args:
        scores_R2: float64, of all rows: the sum of the scored tokens' log-probabilities in nats, and how many of them are not the most
            probable one.
        logits_BSV: of `padded` inputs, any float type; with a group this rank's part of the vocabulary, from entry `first` on.

    Parallelism: four all-reduces of a number a token over `group`, for each `TOKENS_AT_A_TIME`.
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
