"""What `precision` in the config becomes: quantisers of the three operands."""

import math

import pytest

from ngpt.config import compose
from ngpt.config.precision import check_static
from ngpt.precision.quantize import STATIC_AMAX, QuantizerSpec
from ngpt.precision.recipe import Recipe, recipe_of


def recipe(*overrides: str) -> Recipe:
    return recipe_of(compose(["experiment=ngpt_tiny", *overrides]).precision)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8", "mxfp8"])
def test_other_formats_have_no_nvfp4_quantisers(name: str):
    found = recipe(f"precision={name}")
    expected_format = name if name.endswith("fp8") else "none"
    expected_dtype = "fp32" if name == "fp32" else "bf16"
    assert found == Recipe(name, expected_dtype, expected_format, "auto", None, None, None, 0.0)


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
    assert (found.name, found.dtype, found.format, found.executor, found.bf16_tail) == (name, "bf16", "nvfp4", "auto", 0.0)
    assert (found.input, found.weight, found.grad_output) == quantizers


def test_each_option_reaches_its_operand_and_no_other():
    base = recipe("precision=nvfp4_static")
    changed = recipe(
        "precision=nvfp4_static",
        "precision.static_grad_amax=0.328125",
        "precision.weight_blocks=1x16",
        "precision.stochastic_rounding=false",
        "precision.executor=emulated",
        "precision.dtype=fp32",
        "precision.bf16_tail=0.25",
    )
    assert changed.input == base.input
    assert changed.weight == QuantizerSpec((1, 16), "static", 1.3125)
    assert changed.grad_output == QuantizerSpec((1, 16), "static", 0.328125, rounding="rtne")
    assert (changed.executor, changed.dtype, changed.bf16_tail) == ("emulated", "fp32", 0.25)


@pytest.mark.parametrize("exponent", [-115, -3, 0, 127])
def test_the_config_accepts_the_static_amaxes_whose_scale_is_a_power_of_two(exponent: int):
    cfg = compose(["experiment=ngpt_tiny", "precision=nvfp4_static"])
    cfg.precision.static_grad_amax = math.ldexp(STATIC_AMAX, exponent)
    assert not list(check_static(cfg))
    assert math.frexp(448 * 6 / recipe_of(cfg.precision).grad_output.static_amax)[0] == 0.5
    cfg.precision.static_grad_amax = math.nextafter(cfg.precision.static_grad_amax, 0)
    (error,) = check_static(cfg)
    assert f"Set precision.static_grad_amax={math.ldexp(STATIC_AMAX, exponent)!r}" in error.way_out


def test_the_run_header_says_format_scaling_blocks_and_rounding():
    assert recipe("precision=bf16").describe() == "bf16: every layer in bf16"
    assert recipe("precision=nvfp4_nvidia", "precision.bf16_tail=0.1").describe().splitlines() == [
        "nvfp4_nvidia: nvfp4 operands in the linear layers of the blocks, bf16 elsewhere, bf16 everywhere in the last 0.1 of the steps",
        "input dynamic amax, 1x16, rtne, RHT columnwise; weight dynamic amax, 16x16, rtne; "
        "grad_output dynamic amax, 1x16, sr, RHT columnwise",
    ]
    assert "input static amax 1.3125, 1x16, rtne; " in recipe("precision=nvfp4_paper").describe()
