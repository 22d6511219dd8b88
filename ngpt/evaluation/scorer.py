"""Log-probabilities and continuations by a model in memory."""

from collections.abc import Sequence
from typing import Protocol

import torch

from ngpt.evaluation.ranks import Ranks
from ngpt.evaluation.rows import Row, add_scores, answers, batches, padded, readings
from ngpt.hf.generate import Settings, continue_tokens
from ngpt.hf.load import TextModel


class Scorer(Protocol):
    """What an evaluation asks of a model. All ranks get the same rows, and each returns all results.

    Attributes:
        window: tokens that it reads at once.
    """

    @property
    def window(self) -> int: ...

    def score(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """(sum of the scored tokens' log-probabilities in nats, whether each of them is the most probable one) of each row."""
        ...


class ModelScorer:
    """Over a model of `ngpt.hf`, which each rank has whole.

    Args:
        batch_size: texts that a rank reads at once.
        window: tokens that are read at once.
    """

    def __init__(self, source: TextModel, batch_size: int, window: int, ranks: Ranks):
        self.source, self.batch_size, self.window, self.ranks = source, batch_size, window, ranks

    @torch.inference_mode()
    def score(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        scores_R2 = torch.zeros(len(rows), 2, dtype=torch.float64)
        for batch in batches(readings(rows), self.batch_size, self.ranks.rank, self.ranks.size):
            if batch:
                ids_BS = padded(batch, len(batch[0].inputs), len(batch))
                add_scores(scores_R2, batch, self.source.model(ids_BS.to(self.source.model.device)).logits)
        return answers(self.ranks.total(scores_R2))

    def generate(self, starts: Sequence[Sequence[int]], settings: Settings) -> list[str]:
        """Continuations of prompts, given as tokens. Sampling follows `settings.seed` and a prompt's number."""
        order = sorted(range(len(starts)), key=lambda number: len(starts[number]), reverse=True)
        found = {}
        for first in range(self.ranks.rank * self.batch_size, len(order), self.ranks.size * self.batch_size):
            numbers = order[first : first + self.batch_size]
            made, _ = continue_tokens(self.source, [starts[number] for number in numbers], settings, numbers)
            found |= {number: text for number, (text, _, _) in zip(numbers, made, strict=True)}
        texts = self.ranks.collected(found)
        return [texts[number] for number in range(len(starts))]

