"""Counted parameters against those of the model that Megatron builds, for every shipped experiment at its full size."""

import json
from pathlib import Path

import pytest
from torchrun import launch

from ngpt.config import config_dir

EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> dict[str, dict[str, int]]:
    out = tmp_path_factory.mktemp("parameters") / "numbers.json"
    launch(Path(__file__).with_name("parameter_probe.py"), [str(out)], processes=1)
    return json.loads(out.read_text())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_counted_parameters_are_those_of_the_built_model(numbers: dict[str, dict[str, int]], experiment: str):
    assert numbers[experiment]["counted"] == numbers[experiment]["built"]


def test_the_largest_is_the_published_size(numbers: dict[str, dict[str, int]]):
    assert round(numbers["ngpt_hybrid_3b30b_bf16"]["built"] / 1e7) == 3158
