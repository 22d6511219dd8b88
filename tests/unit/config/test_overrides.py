"""A text value is the text that was typed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt.config.compose import compose, dump, load
from ngpt.config.errors import ConfigError

TINY = "experiment=ngpt_tiny"


@pytest.mark.parametrize("text", ["1.10", "2024_12_01", "1e3", "true", "null", "0x10", "a,b", "lang=en", "1e"])
def test_the_name_of_a_run_is_what_was_typed(text, tmp_path):
    config = compose([TINY, f"run.name={text}"])
    assert config.run.name == text and config.run.dir == f"runs/{text}"
    dump(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


TEXT_KEYS = ("data.cache_dir", "checkpoint.dir", "tokenizer.path", "run.root")  # each takes any text


def read_by(texts) -> list[str]:
    """What such keys hold where they are given these texts, in one composition."""
    config = compose([TINY, "run.dir=x", *(f"{key}={text}" for key, text in zip(TEXT_KEYS, texts, strict=True))])
    return [getattr(getattr(config, section), name) for section, name in (key.split(".") for key in TEXT_KEYS)]


ALPHABET = st.sampled_from("ab1. '\"\\=,:()[]{}#~é")
ANY_TEXT = st.text(ALPHABET, min_size=1).filter(lambda text: text[0] not in "'\"" and text != "null")


@settings(max_examples=12, deadline=None)
@given(st.tuples(*[ANY_TEXT] * len(TEXT_KEYS)))
def test_any_text_is_read_as_it_was_typed(texts):
    assert read_by(texts) == list(texts)


@pytest.mark.parametrize(("typed", "read"), [("'1.10'", "1.10"), ('"a b"', "a b"), ("null", None), ("${run.name}_x", "ngpt_tiny_x")])
def test_quotes_null_and_interpolations_mean_what_they_mean_elsewhere(typed, read):
    assert compose([TINY, f"tokenizer.path={typed}"]).tokenizer.path == read


def test_environment_variables_are_text():
    assert compose([TINY, "cluster.environment.OMP_NUM_THREADS=08"]).cluster.environment == {"OMP_NUM_THREADS": "08"}


@pytest.mark.parametrize(
    ("word", "path"),
    [
        ("data.train=[{path: 1.10}]", "data.train[0].path"),
        ("precision.bf16_modules=[1]", "precision.bf16_modules[0]"),
    ],
)
def test_a_number_in_a_list_of_texts_is_refused(word, path):
    with pytest.raises(ConfigError, match="Put it in quotes") as error:
        compose([TINY, "data.mock=false", word])
    assert error.value.path == path


def test_a_number_in_a_file_is_refused(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - ngpt_tiny\n  - _self_\nrun:\n  name: 1.10\n")
    with pytest.raises(ConfigError, match=r"mine.yaml:6: run.name: 1.1. Is text"):
        compose(["experiment=mine"], [tmp_path])


@pytest.mark.parametrize("texts", [["'a'b'", "'a\\'", "'a', 'b'", "'"], ['"', "'a", "'", '"a']], ids=str)
def test_what_only_looks_quoted_is_text(texts):
    assert read_by(texts) == texts
