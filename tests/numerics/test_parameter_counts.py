"""Counted parameters against those of the model that Megatron builds, for every shipped model at its full size."""

import json
from pathlib import Path

import pytest
from torchrun import launch

from ngpt.config import config_dir

MODELS = sorted(path.stem for path in config_dir().glob("model/*.yaml"))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> dict[str, dict[str, int]]:
    out = tmp_path_factory.mktemp("parameters") / "numbers.json"
    launch(Path(__file__).with_name("parameter_probe.py"), [str(out)], processes=1)
    return json.loads(out.read_text())


@pytest.mark.parametrize("model", MODELS)
def test_counted_parameters_are_those_of_the_built_model(numbers: dict[str, dict[str, int]], model: str):
    assert numbers[model]["counted"] == numbers[model]["built"]
    assert numbers[model]["held"] == numbers[model]["built"]  # by the only rank


def test_the_largest_is_the_published_size(numbers: dict[str, dict[str, int]]):
    assert round(numbers["ngpt_hybrid_3b30b"]["built"] / 1e7) == 3158
