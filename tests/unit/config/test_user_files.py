"""What is wrong with a file of the user is told in one line with file and line; words without a value with what they may have meant."""

from pathlib import Path

import pytest

from ngpt.config import ConfigError, compose

TINY = b"# @package _global_\ndefaults: [ngpt_tiny]\n"
WRONG = {  # file behind TINY, line at fault, what is told of it
    "unclosed": (b"train:\n  steps: [1\noptim: {}\n", 5, "expected ',' or ']'"),
    "tab": (b"train:\n\tsteps: 1\n", 4, r"'\t' that cannot start"),
    "two_values": (b"train: steps: 1\n", 3, "mapping values are not allowed here"),
    "twice": (b"train:\n  steps: 4\n  steps: 5\n", 5, "duplicate key steps"),
    "control_character": (b"train:\n  steps: 4\n\0\n", 5, "character 0x0000"),
    "no_text": (b"run:\n  name: \xff\n", 4, "byte 0xff is no UTF-8"),
    "unknown_key": (b"train:\n  stepz: 6\n", 4, "Did you mean train.steps?"),
    "unknown_section": (b"optimm:\n  lr: 3\n", 3, "Did you mean optim?"),
    "unknown_key_in_a_list": (b"data:\n  train:\n    - path: x\n      wight: 3\n", 6, "Did you mean weight?"),
    "wrong_type": (b"train:\n  seed: 1\n  steps: many\n", 5, "Must be a whole number"),
    "number_for_text": (b"run:\n  name: 1.10\n", 4, "Put it in quotes"),
    "number_to_hydra_alone": (b"run:\n  name: 1e3\n", 4, "Put it in quotes"),
    "value_for_a_section": (b"train: 3\n", 3, "train is a section"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "model").mkdir()
    return tmp_path


def refusal(folder: Path, words: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(words, [folder])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_a_file_is_told_with_its_line(name: str, folder: Path):
    text, line, told = WRONG[name]
    file = folder / "experiment" / "mine.yaml"
    file.write_bytes(TINY + text)
    error = refusal(folder, ["experiment=mine"])
    assert f"{file}:{line}" in error and told in error


def test_the_keys_of_a_groups_file_are_found_without_the_group(folder: Path):
    file = folder / "model" / "mine.yaml"
    file.write_text("defaults: [ngpt_tiny, _self_]\nname: mine\nhidden_sise: 3\n")
    error = refusal(folder, ["experiment=ngpt_tiny", "model=mine"])
    assert f"{file}:3" in error and "Did you mean model.hidden_size" in error


@pytest.mark.parametrize(
    ("defaults", "place", "told"),
    [
        ("defaults:\n  - ngpt_tiny  # not nope\n  - override /model: nope\n", ":4", "No file model/nope.yaml"),
        ("defaults:\n  - ngpt_tiny\n  - override /modle: gpt_tiny\n", "", "'modle'"),
        ("defaults: ngpt_tiny\n", "", "defaults must be a list"),
        ("- a\n", ":1", "holds keys"),
    ],
    ids=["no_file", "no_group", "no_list", "no_mapping"],
)
def test_a_mistake_in_the_defaults_names_the_file(defaults: str, place: str, told: str, folder: Path):
    file = folder / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\n" + defaults)
    error = refusal(folder, ["experiment=mine"])
    assert f"{file}{place}" in error and told in error


@pytest.mark.parametrize("text", ["", "train: {steps: 6}\n", "defaults: [ngpt_tiny]\n# A remark\ntrain: {steps: 6}\n"])
def test_an_experiment_without_its_first_line_is_told_to_add_it(text: str, folder: Path):
    file = folder / "experiment" / "mine.yaml"
    file.write_text(text)
    error = refusal(folder, ["experiment=mine"])
    assert error.startswith(f"{file}: No line `# @package _global_`. The first line of an experiment is ") and error.endswith("Add it")


def test_an_experiment_that_names_another_as_a_key_has_its_first_line(folder: Path):
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults: [ngpt_tiny]\nexperiment: other\n")
    assert "first line" not in refusal(folder, ["experiment=mine"])


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("ngpt_tiny", "Did you mean experiment=ngpt_tiny or "),
        ("quickstrt", "Did you mean experiment=quickstart"),
        ("mine", "Did you mean experiment=mine?"),
        ("nvfp4_paper", "Did you mean precision=nvfp4_paper?"),
        ("train.stps", "Did you mean train.steps=VALUE"),
        ("model", "Did you mean model=NAME?"),
        ("xyzzy", "ngpt list"),
    ],
)
def test_a_word_without_a_value_is_told_what_it_may_have_meant(word: str, meant: str, folder: Path):
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults: [ngpt_tiny]\n")
    error = refusal(folder, [word])
    assert error.startswith(f"{word}: ") and meant in error


def test_a_file_that_builds_on_another_has_its_own_name(tmp_path: Path):
    (tmp_path / "precision").mkdir()
    (tmp_path / "precision/mine.yaml").write_text("# Mine.\ndefaults: [nvfp4_nvidia, _self_]\nrht: false\n")
    precision = compose(["experiment=gpt_tiny", "precision=mine"], [tmp_path]).precision
    assert (precision.name, precision.rht, precision.stochastic_rounding) == ("mine", False, True)
    assert compose(["experiment=gpt_tiny", "precision=mine", "precision.name=other"], [tmp_path]).precision.name == "other"
