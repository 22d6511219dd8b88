"""How many sequences an evaluation reads, by hand, and the note where their text repeats."""

import json

import pytest

from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError
from ngpt.config.schema import TokenizerConfig
from ngpt.data.plan import Options
from ngpt.data.prepare import prepare
from ngpt.data.validation import evaluation_batches, evaluation_sequences, repeats

MOCK = ["experiment=ngpt_tiny", "train.global_batch_size=8"]


@pytest.fixture
def with_splits(tmp_path):
    """Composes a config over two validation sources of 321 and 65 tokens, bytes and an end each: 10 and 2 sequences of 32."""
    options = Options(split="100,0,0")
    for name, size in (("a", 320), ("b", 64)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "x" * size}))
        prepare([tmp_path / f"{name}.jsonl"], tmp_path / name, TokenizerConfig(name="bytes", kind="bytes"), options, workers=1)
    sources = f"{{path: {tmp_path / 'a/train'}, weight: 3}}, {{path: {tmp_path / 'b/train'}, weight: 1}}"
    words = ["data.mock=false", "data.train=[{path: x}]", f"data.valid=[{sources}]", "train.seq_length=32"]
    return lambda *more: compose([*MOCK, *words, *more])


@pytest.mark.parametrize(
    ("words", "sequences", "batches"),
    [
        (["train.eval_steps=3"], 24, 3),
        (["train.eval_steps=3", "train.eval_sequences=17"], 17, 3),
        (["train.eval_sequences=16"], 16, 2),
        (["train.eval_steps=0"], 0, 0),
    ],
)
def test_sequences_and_the_batches_that_hold_them(words, sequences, batches):
    config = compose([*MOCK, *words])
    assert (evaluation_sequences(config), evaluation_batches(config)) == (sequences, batches)


def test_the_whole_split_is_every_sequence_of_every_source_once(with_splits):
    config = with_splits("train.eval_whole_split=true")
    assert (evaluation_sequences(config), evaluation_batches(config)) == (12, 2)
    assert repeats(config) == []


def test_text_that_repeats_is_noted_by_source(with_splits):
    assert repeats(with_splits("train.eval_sequences=8")) == []  # 6 of 10 and 2 of 2
    (note,) = repeats(with_splits("train.eval_sequences=12"))  # 9 of 10 and 3 of 2
    assert "3 sequences of 32 tokens" in note and "which has 2: text repeats" in note


@pytest.mark.parametrize("words", [["train.eval_whole_split=true"], ["train.eval_sequences=0"]])
def test_what_makes_no_sense_is_refused(words):
    with pytest.raises(ConfigError, match=words[0].split("=")[0]):
        compose([*MOCK, *words])


def test_a_split_without_a_sequence_is_named(with_splits):
    with pytest.raises(ConfigError, match="data.valid: .*b/train: 65 tokens"):
        evaluation_sequences(with_splits("train.eval_whole_split=true", "train.seq_length=128"))


def test_missing_validation_data_is_asked_for_by_the_key_that_needs_it():
    with pytest.raises(ConfigError, match="train.eval_sequences 64 needs validation data.*train.eval_sequences=null"):
        compose([*MOCK, "data.mock=false", "data.train=[{path: x}]", "train.eval_steps=0", "train.eval_sequences=64"])
