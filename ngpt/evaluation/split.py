"""Bits per byte of prepared text, as training's own evaluation of a whole split measures them."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ngpt.config.errors import ConfigError
from ngpt.config.schema import DataConfig
from ngpt.data.indexed import IndexedReader
from ngpt.data.manifest import split_of
from ngpt.data.tokenizers import from_manifest
from ngpt.data.validation import sequences_of_split
from ngpt.evaluation.rows import Row
from ngpt.evaluation.scorer import Scorer

ROWS_AT_A_TIME = 1024
PROBED_TOKENS = 2000


@dataclass(frozen=True)
class SplitScore:
    """Loss of a prepared split.

    Attributes:
        loss: nats per token. bits_per_byte: of its text in UTF-8; the ends of documents are counted with the text.
        sequences, tokens: that were predicted.
    """

    loss: float
    bits_per_byte: float
    sequences: int
    tokens: int


def sequences(prefix: str, seq_length: int, seed: int) -> Iterator[np.ndarray]:
    """The sequences of one pass over a split in training's evaluation, [seq_length + 1] each: the last token is the next one's first.

    Source: megatron-core 0.19.2, `core/datasets/gpt_dataset.py`: documents in the order that the seed gives, end to end, cut into
    sequences; the tokens left over at the end are dropped. (Megatron then draws the sequences in another order.)
    """
    documents = IndexedReader(prefix)
    order = np.arange(len(documents), dtype=np.int32)
    np.random.RandomState(seed).shuffle(order)
    held = np.zeros(0, dtype=documents.dtype)
    for document in order:
        held = np.concatenate([held, documents[int(document)]])
        cut = max(0, len(held) - 1) // seq_length
        for first in range(0, cut * seq_length, seq_length):
            yield held[first : first + seq_length + 1]
        held = held[cut * seq_length :]


def notes_on(data: DataConfig) -> list[str]:
    """How a run's own text is read otherwise here than in its training."""
    notes = []
    if data.mask_eod_loss:
        notes.append("note: training left out what follows an end of document (data.mask_eod_loss); here it counts")
    if data.confine_attention:
        notes.append("note: training confined attention to documents (data.confine_attention); here it sees those before")
    return notes


def score_split(
    scorer: Scorer, encode: Callable[[str], Sequence[int]], prefix: str, seed: int, limit: int | None, tick: Callable[[int, int], None]
) -> SplitScore:
    """Measures the loss of a split.

    Args:
        encode: the model's tokenizer; the data's must give text the same numbers.
        prefix: of the split's files, as `ngpt data prepare` wrote them.
        seed: `train.eval_seed`: it decides which documents meet in a sequence.
        limit: sequences at most; None: all.
        tick: is told how many of the split's sequences are done, and how many there are.

    Raises:
        ConfigError: no prepared split, too short a one, or one of another tokenizer.
    """
    check_tokenizer(encode, prefix)
    manifest, name = split_of(prefix)
    split, length = manifest.splits[name], scorer.window
    there = sequences_of_split(prefix, length)
    wanted = there if limit is None else min(limit, there)
    total, done = 0.0, 0
    found = itertools.islice(sequences(prefix, length, seed), wanted)
    while part := list(itertools.islice(found, ROWS_AT_A_TIME)):
        total += sum(score for score, _ in scorer.score([Row(tuple(sequence.tolist()), length) for sequence in part]))
        done += len(part)
        tick(done, there)
    loss = -total / (done * length)
    return SplitScore(loss, loss / math.log(2) * split.tokens / split.bytes_of_text, done, done * length)


def check_tokenizer(encode: Callable[[str], Sequence[int]], prefix: str) -> None:
    """Text of the split's first document must get the split's numbers.

    Raises:
        ConfigError: it does not.
    """
    tokenizer = from_manifest(split_of(prefix)[0])
    documents = IndexedReader(prefix)
    text = tokenizer.decode(documents[0][:PROBED_TOKENS].tolist()) if len(documents) else ""
    if list(map(int, encode(text))) != tokenizer.encode(text).tolist():
        rule = f"It was prepared with {tokenizer.name} ({tokenizer.kind}), which numbers text otherwise than the model's tokenizer"
        raise ConfigError("--split", prefix, rule, "Prepare the text with the model's tokenizer")
