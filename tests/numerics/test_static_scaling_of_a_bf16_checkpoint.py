"""A checkpoint that was trained in BF16, where output projections read operands of any length, analysed under static scaling."""

import json
from pathlib import Path

import pytest
from static_probe import STATIC, TINY
from torchrun import launch

from ngpt.config import compose
from ngpt.config.linears import recipe_by_linear

BF16_ROUNDING = 2.0**-8
NEAR_TIES = 0.02  # of an error: a last bit of BF16 takes some elements over a rounding boundary
ALONE = ("linear_proj", "linear_fc2", "out_proj")  # without experts, which are summed before the residual step takes their length off
LINEARS = sorted(recipe_by_linear(compose([*TINY, *STATIC])))
SOLE = [name for name in LINEARS if name.endswith(ALONE) and "experts" not in name]


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("static") / "probed.json"
    launch(Path(__file__).with_name("static_probe.py"), [str(out)], processes=1)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", SOLE)
def test_the_run_that_trained_it_computed_no_norm(probed, name):
    assert probed["trained"][name]["deviation"] > 0.1


@pytest.mark.parametrize("name", LINEARS)
def test_every_operand_that_is_looked_at_has_unit_norm(probed, name):
    seen = probed["looked_at"][name]
    assert seen["deviation"] < BF16_ROUNDING and seen["amax"] <= 1


@pytest.mark.parametrize("name", LINEARS)
def test_the_figures_are_those_of_unit_vectors_in_the_formats_range(probed, name):
    figures = {figure: probed["figures"][f"precision/{name}/input/{figure}"] for figure in ("relative_error", "saturated_fraction")}
    assert figures["relative_error"] == pytest.approx(probed["looked_at"][name]["relative_error"], rel=NEAR_TIES)
    assert figures["saturated_fraction"] == 0
