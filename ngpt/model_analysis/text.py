"""The text that an analysis reads: whole sequences of prepared splits, the same for every model with that tokenizer and length."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import torch
from torch import Tensor

from ngpt.data.manifest import split_of
from ngpt.evaluation.split import sequences

POOL = 64


@dataclass(frozen=True)
class Text:
    """Sequences drawn from splits.

    Attributes:
        ids_NS: int64 [N, S + 1], on the CPU; the last token is only predicted.
        bits_per_nat: bits per byte of UTF-8 that equal one nat per token.
    """

    ids_NS: Tensor
    bits_per_nat: float

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return self.ids_NS.size(0) * (self.ids_NS.size(1) - 1)


def read_text(prefixes: Sequence[str], length: int, count: int, seed: int) -> Text:
    """Draws sequences without replacement, about equally many from each split. Neighbours in a document would not be independent.

    They are drawn from the first POOL times as many, so that a large split need not be read to its end.

    Args:
        length: S, in tokens.
        count: N; at most as many as there are.
        seed: decides which documents share a sequence, and which sequences are drawn.
    """
    pool = [sequence.astype(np.int64) for sequence in itertools.islice(_in_turn(prefixes, length, seed), POOL * count)]
    chosen = np.random.RandomState(seed).permutation(len(pool))[:count]
    ids_NS = torch.from_numpy(np.stack([pool[number] for number in chosen]))
    splits = [manifest.splits[name] for manifest, name in map(split_of, prefixes)]
    tokens_per_byte = sum(split.tokens for split in splits) / sum(split.bytes_of_text for split in splits)
    return Text(ids_NS, tokens_per_byte / log(2))


def _in_turn(prefixes: Sequence[str], length: int, seed: int) -> Iterator[np.ndarray]:
    for together in zip(*(sequences(prefix, length, seed) for prefix in prefixes), strict=False):
        yield from together
