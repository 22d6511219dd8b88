"""The sequences of a split against those that Megatron's dataset gives training, and the figures against fp64."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main
from ngpt.config.errors import ConfigError
from ngpt.data.tokenizers import BytesTokenizer
from ngpt.evaluation.split import score_split, sequences

SEQUENCE = 16
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box"


class TableScorer:
    """Each token has the probability that it has in a fixed table, whatever comes before it."""

    window = SEQUENCE

    def __init__(self):
        self.probability = np.random.RandomState(5).dirichlet(np.ones(257))

    def score(self, rows):
        return [(sum(math.log(self.probability[token]) for token in row.tokens[-row.scored :]), False) for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prepared bytes: documents of different lengths, half of them in valid."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = [" ".join(WORDS.split()[number % 5 :][: 1 + number % 9]) + f" {number}" for number in range(90)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--out", str(folder / "data"), "--tokenizer", "bytes", "--split", "50,50,0", "--workers", "1"]
    assert main(["data", "prepare", str(folder / "texts.jsonl"), *arguments]) == 0
    return folder / "data"


def test_sequences_are_those_of_megatrons_dataset(folder):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    from megatron_ext.training.data import _DatasetTokenizer

    prefix = str(folder / "valid")
    indexed = IndexedDataset(prefix)
    config = GPTDatasetConfig(
        random_seed=77, sequence_length=SEQUENCE, blend=([prefix], None), split="1", tokenizer=_DatasetTokenizer(257, 256),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        path_to_cache=str(folder / "cache"),
    )  # fmt: skip
    documents = np.arange(len(indexed.sequence_lengths), dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, documents, None, Split.valid, config)
    theirs = [tuple(dataset[i]["tokens"].tolist()) + (int(dataset[i]["labels"][-1]),) for i in range(len(dataset))]
    ours = [tuple(sequence.tolist()) for sequence in sequences(prefix, SEQUENCE, seed=77)]
    assert Counter(ours) == Counter(theirs) and len(ours) > 40
    assert Counter(ours) != Counter(tuple(sequence.tolist()) for sequence in sequences(prefix, SEQUENCE, seed=78))


def test_loss_and_bits_per_byte_are_those_of_the_text(folder):
    scorer, ticks = TableScorer(), []
    found = score_split(scorer, BytesTokenizer().encode, str(folder / "valid"), 77, None, lambda *tick: ticks.append(tick))
    stream = np.concatenate([np.asarray(sequence[1:]) for sequence in sequences(str(folder / "valid"), SEQUENCE, 77)])
    assert found.loss == pytest.approx(-np.log(scorer.probability[stream]).mean(), rel=1e-12)
    split = json.loads((folder / "manifest.json").read_text())["splits"]["valid"]
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) * split["tokens"] / split["bytes_of_text"], rel=1e-12)
    assert found.tokens == len(stream) == found.sequences * SEQUENCE and ticks == [(found.sequences, found.sequences)]
    assert score_split(scorer, BytesTokenizer().encode, str(folder / "valid"), 77, 3, lambda *tick: None).sequences == 3


def test_a_split_of_another_tokenizer_is_refused(folder):
    with pytest.raises(ConfigError, match="numbers text otherwise than the model's tokenizer"):
        score_split(TableScorer(), lambda text: [0] * len(text), str(folder / "valid"), 77, None, lambda *tick: None)
