"""A config of files that were read before is the one that Hydra composes, and Hydra is not asked again."""

import os
from pathlib import Path

import pytest
from hydra.errors import HydraException

from ngpt.config import compose, composition
from ngpt.config.composition import composed
from ngpt.config.containers import plain
from ngpt.config.folders import config_dir

SEARCH_PATH = "hydra.searchpath=[]"
FOLDERS = [config_dir()]
TINY = "experiment=ngpt_tiny"


def by_hydra(overrides: list[str]) -> tuple[dict, dict]:
    config, choices = composition._by_hydra((SEARCH_PATH, *overrides), FOLDERS[0])
    return plain(config), choices


@pytest.fixture
def readings(monkeypatch) -> list[tuple[str, ...]]:
    """The overrides with which Hydra was asked."""
    asked, ask = [], composition._by_hydra
    composition._of_files.cache_clear()
    monkeypatch.setattr(composition, "_by_hydra", lambda overrides, shipped: asked.append(overrides) or ask(overrides, shipped))
    return asked


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["run.name=a", TINY, "model.hidden_size=96", "model.hidden_size=128", "precision=nvfp4_paper"],
        ["experiment=ngpt_hybrid_tiny", "data.train=[{path: a},{path: b}]", "++megatron.log_params_norm=true", "run.name='a=b.c=1'"],
        ["model=ngpt_tiny", "train.steps=${train.seed}", "+model.unknown=1"],
    ],
)
def test_values_behind_known_files_give_what_hydra_gives(overrides, readings):
    expected = by_hydra(overrides)
    for _ in range(2):
        assert composed(overrides, SEARCH_PATH, FOLDERS) == expected
    assert len([asked for asked in readings if asked != (SEARCH_PATH, *overrides)]) <= 1


def test_other_values_do_not_ask_hydra_again_and_other_files_do(readings):
    configs = [composed([TINY, f"train.seed={seed}"], SEARCH_PATH, FOLDERS)[0] for seed in (1, 2, 3)]
    assert [config["train"]["seed"] for config in configs] == [1, 2, 3]
    configs[0]["model"]["hidden_size"] = 7
    assert composed([TINY], SEARCH_PATH, FOLDERS)[0]["model"]["hidden_size"] != 7
    assert readings == [(SEARCH_PATH, TINY)]
    composed([TINY, "precision=bf16"], SEARCH_PATH, FOLDERS)
    assert readings[1:] == [(SEARCH_PATH, TINY, "precision=bf16")]


@pytest.mark.parametrize("word", ["run={name: b}", "++run={name: b}"])
def test_words_whose_place_matters_all_go_to_hydra(word, readings):
    overrides = [TINY, "run.name=a", word, "train.steps=3"]
    assert composed(overrides, SEARCH_PATH, FOLDERS) == by_hydra(overrides)
    assert (SEARCH_PATH, *overrides) in readings


@pytest.mark.parametrize("word", ["model.no_such_key=1", "train.steps=[", "train.steps=1,2", "model=no_such_model", "train.steps=words"])
def test_an_error_is_hydras_own(word):
    overrides = [TINY, "run.name=a", word]
    errors = []
    for ask in (lambda: composed(overrides, SEARCH_PATH, FOLDERS), lambda: by_hydra(overrides)):
        with pytest.raises(HydraException) as raised:
            ask()
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_a_file_that_has_changed_is_read_again(tmp_path: Path):
    file = tmp_path / "model" / "mine.yaml"
    file.parent.mkdir()
    words = [TINY, "model=mine"]
    for hidden, moment in ((96, 1), (80, 2), (128, 2)):  # the time alone changes, then the size
        file.write_text(f"defaults: [ngpt_tiny]\nhidden_size: {hidden}\n")
        os.utime(file, (moment, moment))
        assert compose(words, [tmp_path]).model.hidden_size == hidden
    file.unlink()
    (file.parent / "other.yaml").write_text("defaults: [ngpt_tiny]\n")
    with pytest.raises(ValueError, match="mine"):
        compose(words, [tmp_path])
