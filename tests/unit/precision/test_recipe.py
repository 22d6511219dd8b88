"""What `precision` in the config becomes: quantisers of the three operands."""

import dataclasses
import itertools
import math

import pytest

from ngpt.config import compose
from ngpt.config.recipe_rules import check_table
from ngpt.config.recipes import recipe_of
from ngpt.recipes import DIRECTIONS, OPERANDS, STATIC_AMAX, FourOverSix, QuantizerSpec, Recipe


def recipe(*overrides: str) -> Recipe:
    return recipe_of(compose(["experiment=ngpt_tiny", *overrides]).precision)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8", "mxfp8"])
def test_other_formats_have_no_nvfp4_quantisers(name: str):
    found = recipe(f"precision={name}")
    expected_format = name if name.endswith("fp8") else "none"
    expected_dtype = "fp32" if name == "fp32" else "bf16"
    assert found == Recipe(name, expected_dtype, expected_format)


@pytest.mark.parametrize(
    ("name", "quantizers"),
    [
        (
            "nvfp4_paper",
            (
                QuantizerSpec((1, 16), "static", 1.3125),
                QuantizerSpec((16, 16), "static", 1.3125),
                QuantizerSpec((1, 16), "dynamic_pow2", rounding="sr"),
            ),
        ),
        (
            "nvfp4_nvidia",
            (
                QuantizerSpec((1, 16), "dynamic", rht="signed"),
                QuantizerSpec((16, 16), "dynamic"),
                QuantizerSpec((1, 16), "dynamic", rht="signed", rounding="sr"),
            ),
        ),
        (
            "nvfp4_four_over_six",
            (
                QuantizerSpec(four_over_six=FourOverSix(256, "MAE")),
                QuantizerSpec((16, 16), four_over_six=FourOverSix(256, "MAE")),
                QuantizerSpec(rounding="sr"),
            ),
        ),
        (
            "nvfp4_static",
            (
                QuantizerSpec((1, 16), "static", 1.3125),
                QuantizerSpec((16, 16), "static", 1.3125),
                QuantizerSpec((1, 16), "static", 1.3125, rounding="sr"),
            ),
        ),
    ],
)
def test_named_recipes_are_what_their_sources_say(name: str, quantizers: tuple[QuantizerSpec, ...]):
    found = recipe(f"precision={name}")
    assert (found.name, found.dtype, found.format) == (name, "bf16", "nvfp4")
    assert (found.input, found.weight, found.grad_output) == quantizers


def test_each_option_reaches_its_operand_and_no_other():
    base = recipe("precision=nvfp4_static")
    changed = recipe(
        "precision=nvfp4_static",
        "precision.static_grad_amax=0.328125",
        "precision.weight_blocks=1x16",
        "precision.stochastic_rounding=false",
        "precision.dtype=fp32",
    )
    assert changed.input == base.input
    assert changed.weight == QuantizerSpec((1, 16), "static", 1.3125)
    assert changed.grad_output == QuantizerSpec((1, 16), "static", 0.328125, rounding="rtne")
    assert changed.dtype == "fp32"


@pytest.mark.parametrize("exponent", [-115, -3, 0, 127])
def test_the_config_accepts_the_static_amaxes_whose_scale_is_a_power_of_two(exponent: int):
    cfg = compose(["experiment=ngpt_tiny", "precision=nvfp4_static"])
    cfg.precision.static_grad_amax = math.ldexp(STATIC_AMAX, exponent)
    assert not list(check_table(cfg))
    assert math.frexp(448 * 6 / recipe_of(cfg.precision).grad_output.static_amax)[0] == 0.5
    cfg.precision.static_grad_amax = math.nextafter(cfg.precision.static_grad_amax, 0)
    (error,) = check_table(cfg)
    assert f"Set precision.static_grad_amax={math.ldexp(STATIC_AMAX, exponent)!r}" in error.way_out


TABLE = {  # overrides: operand and direction -> what changes there, and nowhere else
    ("precision.operands.weight.amax=dynamic",): {
        ("weight", "rowwise"): {"global_amax": "dynamic"},
        ("weight", "columnwise"): {"global_amax": "dynamic"},
    },
    ("precision.operands.weight_columnwise.blocks=1x16",): {("weight", "columnwise"): {"block_shape": (1, 16)}},
    ("precision.operands.grad_output.rounding=nearest", "precision.operands.grad_output_columnwise.rounding=stochastic"): {
        ("grad_output", "rowwise"): {"rounding": "rtne"}
    },
    ("precision.operands.input_rowwise={amax: dynamic, four_over_six: mse, bound: 448}",): {
        ("input", "rowwise"): {"global_amax": "dynamic", "four_over_six": FourOverSix(448, "MSE")}
    },
    ("precision.operands.grad_output_rowwise={amax: static, static_amax: 0.65625}",): {
        ("grad_output", "rowwise"): {"global_amax": "static", "static_amax": 0.65625}
    },
}


@pytest.mark.parametrize("overrides", TABLE, ids=lambda overrides: overrides[0].partition("=")[0].removeprefix("precision.operands."))
def test_a_row_of_the_table_changes_its_operands_and_directions_alone(overrides):
    base, changed = recipe("precision=nvfp4_paper"), recipe("precision=nvfp4_paper", *overrides)
    for operand, direction in itertools.product(OPERANDS, DIRECTIONS):
        wanted = dataclasses.replace(getattr(getattr(base, operand), direction), **TABLE[overrides].get((operand, direction), {}))
        if wanted.global_amax != "static":
            wanted = dataclasses.replace(wanted, static_amax=getattr(getattr(changed, operand), direction).static_amax)  # not read
        assert getattr(getattr(changed, operand), direction) == wanted, (operand, direction)


def test_a_transform_of_the_table_is_that_of_both_columnwise_operands_of_wgrad():
    rht = [f"precision.operands.{operand}.rht=unsigned" for operand in ("input", "grad_output")]
    changed = recipe("precision=nvfp4_nvidia", "precision.rht=false", *rht)
    assert (changed.input, changed.weight.rht, changed.grad_output.rht) == (QuantizerSpec(rht="unsigned"), "off", "unsigned")
    with pytest.raises(ValueError, match="cancels in wgrad alone"):
        dataclasses.replace(changed, grad_output=QuantizerSpec())
    with pytest.raises(ValueError, match="cancels in wgrad alone"):
        dataclasses.replace(changed, weight=QuantizerSpec(rht="unsigned"))


def test_the_run_header_says_format_scaling_blocks_and_rounding():
    assert recipe("precision=bf16").describe() == ""
    assert recipe("precision=nvfp4_nvidia").describe() == (
        "input dynamic amax, 1x16, rtne, RHT columnwise; weight dynamic amax, 16x16, rtne; "
        "grad_output dynamic amax, 1x16, sr, RHT columnwise"
    )
    assert "input static amax 1.3125, 1x16, rtne; " in recipe("precision=nvfp4_paper").describe()
    mixed = recipe("precision=nvfp4_four_over_six", "precision.operands.weight_columnwise.four_over_six=none")
    assert (
        "weight dynamic amax, 16x16, rtne, 4 over 6 by MAE up to 256 rowwise and dynamic amax, 16x16, rtne columnwise; " in mixed.describe()
    )
