"""Properties of the reference quantiser: what must hold for every input, and the refusals."""

import dataclasses
import importlib
import math

import pytest
import torch
from torch import Tensor

from ngpt.precision import FourOverSix, QuantizerSpec, quantize
from ngpt.precision.formats import decode_e4m3, unpack_e2m1
from ngpt.precision.hadamard import SIGNS, random_hadamard_transform
from ngpt.precision.quantize import _block_error

quantize_module = importlib.import_module("ngpt.precision.quantize")  # the package has a function of that name

SPECS = {
    "dynamic": QuantizerSpec(),
    "pow2": QuantizerSpec(global_amax="dynamic_pow2"),
    "static": QuantizerSpec(global_amax="static"),
    "2d": QuantizerSpec(block_shape=(16, 16)),
    "2d_pow2": QuantizerSpec(block_shape=(16, 16), global_amax="dynamic_pow2"),
    "4over6": QuantizerSpec(four_over_six=FourOverSix()),
    "row_scaled": QuantizerSpec(row_scaled=True),
}
DYNAMIC = ["dynamic", "pow2", "2d", "2d_pow2", "4over6", "row_scaled"]
POW2 = ["pow2", "static", "2d_pow2"]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def sample(generator: torch.Generator, rows: int = 32, columns: int = 64, spread: float = 1.0) -> Tensor:
    """Values within [-1, 1] whose 16x16 blocks differ in size by up to 2^spread."""
    size = torch.exp2(spread * torch.rand(rows // 16, columns // 16, generator=generator))
    x = torch.randn(rows, columns, generator=generator) * size.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return (x / x.abs().max()).bfloat16()


def random_bytes(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", POW2)
def test_quantising_twice_changes_no_value(name, generator):
    once = quantize(sample(generator), SPECS[name]).dequantize()
    assert torch.equal(quantize(once, SPECS[name]).dequantize(), once)


@pytest.mark.parametrize("power", [-40, -3, 1, 30])
@pytest.mark.parametrize("name", DYNAMIC)
def test_a_power_of_two_moves_only_the_global_amax(name, power, generator):
    x = sample(generator)
    plain, scaled = quantize(x, SPECS[name]), quantize(x * 2.0**power, SPECS[name])
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.block_decode_scale, scaled.block_decode_scale)
    assert torch.equal(plain.global_amax * 2.0**power, scaled.global_amax)


def test_a_power_of_two_moves_only_the_block_scales_of_a_static_quantiser(generator):
    x = sample(generator)
    plain, scaled = quantize(x, SPECS["static"]), quantize(x / 4, SPECS["static"])
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(decode_e4m3(plain.block_decode_scale) / 4, decode_e4m3(scaled.block_decode_scale))


@pytest.mark.parametrize("rounding", ["rtne", "sr"])
@pytest.mark.parametrize("name", ["dynamic", "static", "2d"])
def test_a_sign_flips_only_sign_bits(name, rounding, generator):
    x, draws = sample(generator), random_bytes(generator, 32, 64)
    spec = dataclasses.replace(SPECS[name], rounding=rounding)
    plain, negated = (quantize(value, spec, random_bytes=draws) for value in (x, -x))
    assert torch.equal(unpack_e2m1(plain.codes) ^ 8, unpack_e2m1(negated.codes))
    assert torch.equal(plain.block_decode_scale, negated.block_decode_scale)


@pytest.mark.parametrize("name", SPECS)
def test_order_within_a_block_is_kept(name, generator):
    x = sample(generator, spread=20)
    values = quantize(x, SPECS[name]).dequantize().view(-1, 16)
    order = x.view(-1, 16).float().argsort(dim=1)
    assert (values.gather(1, order).diff(dim=1) >= 0).all()


@pytest.mark.parametrize("name", POW2)
def test_code_times_scale_is_exact_in_bf16_with_a_power_of_two_scale(name, generator):
    """Tensors over the whole range of block scales, subnormal ones included: neither the fp32 order nor bf16 rounds."""
    x = sample(generator, 64, 256, spread=17)
    quantised = quantize(x, SPECS[name])
    assert (quantised.block_decode_scale < 8).any() and (quantised.block_decode_scale > 100).any()
    exact = quantised.decode().double() * quantised.global_amax.double() / 2688
    assert torch.equal(quantised.dequantize().double(), exact)
    assert torch.equal(quantised.dequantize(torch.bfloat16).double(), exact)
    assert torch.frexp(quantised.global_amax / 2688).mantissa.item() == 0.5


def test_static_scale_is_two_to_the_eleven(generator):
    quantised = quantize(sample(generator), SPECS["static"])
    assert quantised.global_amax.item() == 1.3125
    assert torch.equal(quantised.dequantize(), quantised.decode() * 2.0**-11)


@pytest.mark.parametrize("amax", [1e-45, 1e-37, 0.3, 1.3125, math.nextafter(1.3125, 2), 2.0, 2.7e4, 2.2e38])
def test_pow2_amax_is_the_next_one_up(amax):
    quantised = quantize(torch.full((1, 16), amax), SPECS["pow2"])
    rounded = quantised.global_amax.item()
    exponent = math.log2(rounded / 1.3125)
    assert exponent == int(exponent)
    assert rounded >= torch.tensor(amax).item()
    assert rounded < 2 * amax or exponent == -115


def test_relative_error_of_a_gaussian_is_as_published():
    """.095 for 1x16 and .111 for 16x16 blocks, with dynamic and static scales alike."""
    x = torch.nn.functional.normalize(torch.randn(128, 1024, generator=torch.Generator().manual_seed(0)), dim=-1)
    for spec, error in ((SPECS["dynamic"], 0.0952), (SPECS["static"], 0.0952), (SPECS["2d"], 0.1114)):
        assert ((quantize(x, spec).dequantize() - x).norm() / x.norm()).item() == pytest.approx(error, abs=6e-4)


def test_columnwise_is_rowwise_of_the_transpose(generator):
    x = sample(generator, 48, 32)
    columnwise, transposed = quantize(x, SPECS["dynamic"], "columnwise"), quantize(x.t(), SPECS["dynamic"])
    assert torch.equal(columnwise.codes, transposed.codes)
    assert torch.equal(columnwise.block_decode_scale, transposed.block_decode_scale)
    assert columnwise.shape == (48, 32) and columnwise.stored_shape == (32, 48)


@pytest.mark.parametrize("name", ["2d", "2d_pow2"])
def test_square_blocks_give_the_same_values_in_both_directions(name, generator):
    x = sample(generator, 48, 32)
    assert torch.equal(quantize(x, SPECS[name]).dequantize(), quantize(x, SPECS[name], "columnwise").dequantize().t())


def test_leading_dimensions_are_rows(generator):
    x = sample(generator)
    assert torch.equal(quantize(x.view(2, 16, 64), SPECS["2d"]).codes, quantize(x, SPECS["2d"]).codes)
    assert quantize(x.view(2, 16, 64), SPECS["2d"]).shape == (2, 16, 64)


def test_zero_blocks_and_zero_tensors_have_scale_zero(generator):
    x = sample(generator)
    x[3, 16:32] = 0
    quantised = quantize(x, SPECS["dynamic"])
    assert quantised.block_decode_scale[3, 1] == 0
    assert (quantised.dequantize()[3, 16:32] == 0).all()
    for spec in SPECS.values():
        nothing = quantize(torch.zeros(16, 32), spec)
        assert (nothing.dequantize() == 0).all() and (nothing.block_decode_scale == 0).all()
        assert nothing.counters()["flushed_blocks"] == 0


@pytest.mark.parametrize("name", SPECS)
def test_no_rows_are_fine(name):
    assert quantize(torch.zeros(0, 32), SPECS[name]).dequantize().shape == (0, 32)


@pytest.mark.parametrize("name", DYNAMIC)
def test_nan_reaches_the_block(name, generator):
    x = sample(generator)
    x[5, 7] = math.nan
    quantised = quantize(x, SPECS[name])
    assert quantised.block_decode_scale[5, 0] in (0x7F, 0xFF)
    assert quantised.dequantize()[5, 7].isnan()


def test_nan_stays_in_its_block_with_a_static_scale(generator):
    x = sample(generator)
    clean = quantize(x, SPECS["static"]).dequantize()
    x[5, 7] = math.nan
    values = quantize(x, SPECS["static"]).dequantize()
    assert values[5, :16].isnan().all()
    assert torch.equal(values[:5], clean[:5]) and torch.equal(values[5, 16:], clean[5, 16:])


@pytest.mark.parametrize("name", ["dynamic", "pow2", "2d"])
def test_inf_gives_the_largest_scale_and_inf_values(name, generator):
    x = sample(generator)
    x[5, 7] = -math.inf
    quantised = quantize(x, SPECS[name])
    assert quantised.global_amax.item() == math.inf
    assert quantised.block_decode_scale[5, 0] == 0x7E
    assert quantised.dequantize()[5, 7] == -math.inf


def test_counters_count_clipped_elements_and_flushed_blocks(generator):
    x = torch.full((32, 64), 0.5)
    x[0, 0], x[1, 1], x[2, 2] = 1.3125, 1.5, -2.0
    x[4:20, 16:32] = 1e-8
    for spec, blocks, flushed in ((SPECS["static"], 128, 16), (dataclasses.replace(SPECS["static"], block_shape=(16, 16)), 8, 0)):
        counters = quantize(x, spec).counters()
        assert counters == {"elements": 2048, "blocks": blocks, "saturated_elements": 2, "flushed_blocks": flushed}
    x[:16, 16:32] = 1e-8
    assert quantize(x, dataclasses.replace(SPECS["static"], block_shape=(16, 16))).counters()["flushed_blocks"] == 1
    assert quantize(x, SPECS["dynamic"]).counters()["saturated_elements"] == 0


@pytest.mark.parametrize("global_amax", ["dynamic", "static"])
def test_stochastic_rounding_is_unbiased(global_amax):
    """|z| < 4 of the mean of repeated quantisations, in every bin of the E2M1 grid and in total."""
    repeats = 4000
    ramp = torch.linspace(0.003, 1, 15)
    x = torch.cat((torch.tensor([1.0]), ramp)).view(1, 16)  # the largest value makes the block's scale
    spec = QuantizerSpec(rounding="sr", global_amax=global_amax)
    drawn = quantize(x.expand(repeats, 16), spec, seed=5).dequantize().double()
    reachable = drawn.amax(0) > x[0] - 1e-9  # an element above 6 * its scale is clipped, not rounded
    error = (drawn - x.double())[:, reachable]
    z = error.mean(0) / (error.std(0) / repeats**0.5 + 1e-12)
    assert reachable.sum() >= 13
    assert z.abs().max() < 4
    assert abs(z.sum().item()) / reachable.sum().item() ** 0.5 < 4


def test_stochastic_rounding_depends_on_the_seed_alone(generator):
    x, spec = sample(generator), QuantizerSpec(rounding="sr")
    first, again, other = (quantize(x, spec, seed=seed) for seed in (1, 1, 2))
    assert first.same_as(again) and not first.same_as(other)


def test_directions_draw_their_own_bits_unless_blocks_are_square(generator):
    x = sample(generator)[:, :32]
    x = x + x.t()  # symmetric, so that both directions have the same blocks
    for shape, same in (((1, 16), False), ((16, 16), True)):
        spec = QuantizerSpec(block_shape=shape, rounding="sr")
        rows, columns = (quantize(x, spec, direction, seed=1).dequantize() for direction in ("rowwise", "columnwise"))
        assert torch.equal(rows, columns.t()) == same


def test_the_largest_random_number_moves_no_grid_point(monkeypatch):
    """1 - 2^-17 must not round up in the addition: a value on the grid would then move with probability 2^-16."""
    x = torch.tensor([[6.0, 4, 3, 2, 1.5, 1, 0.5, 0, -6, -4, -3, -2, -1.5, -1, -0.5, 0]])
    monkeypatch.setattr(quantize_module, "random_bits", lambda *_: torch.full((1, 16), 2**16 - 1))
    spec = QuantizerSpec(rounding="sr", global_amax="static", static_amax=2688.0)  # all scales are one
    assert torch.equal(quantize(x, spec, seed=0).dequantize(), x)


def test_4over6_errors_are_summed_in_the_order_of_the_kernel(generator):
    """16 elements in turn, then rows r and r + 8, r + 4, r + 2, r + 1: fp32 sums in another order differ in the last bit."""
    x = torch.randn(16, 64 * 16, generator=generator)
    codes, scales = torch.zeros(16, 64 * 16, dtype=torch.uint8), torch.zeros(16, 64, dtype=torch.uint8)
    spec = QuantizerSpec(four_over_six=FourOverSix())
    terms = x.abs().view(16, 64, 16).numpy()
    rows = terms[:, :, 0]
    for element in range(1, 16):
        rows = rows + terms[:, :, element]
    assert torch.equal(_block_error(x, codes, scales, torch.ones(1, 1), spec), torch.from_numpy(rows))
    for half in (8, 4, 2, 1):
        rows = rows[:half] + rows[half:]
    square = dataclasses.replace(spec, block_shape=(16, 16))
    assert torch.equal(_block_error(x, codes, scales, torch.ones(1, 1), square), torch.from_numpy(rows).expand(16, 64))


def test_hadamard_transform_is_the_matrix_product(generator):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < 16:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    x = sample(generator)
    for rht, signs in (("signed", torch.tensor(SIGNS)), ("unsigned", torch.ones(16))):
        expected = x.double().view(-1, 16) @ (signs.double().diag() @ matrix / 4)
        assert torch.equal(random_hadamard_transform(x, rht), expected.view_as(x).float().bfloat16())


def test_hadamard_transform_touches_the_columnwise_direction_only(generator):
    x, spec = sample(generator), QuantizerSpec(rht="signed")
    assert torch.equal(quantize(x, spec).codes, quantize(x, SPECS["dynamic"]).codes)
    columnwise = quantize(x, spec, "columnwise")
    assert columnwise.rht == "signed"
    assert torch.equal(columnwise.codes, quantize(random_hadamard_transform(x.t(), "signed"), SPECS["dynamic"]).codes)


@pytest.mark.parametrize(
    ("shape", "spec", "direction", "message"),
    [
        ((16, 24), "dynamic", "rowwise", "24 stored columns.*multiple of 16.*Pad to 32"),
        ((24, 16), "dynamic", "columnwise", "24 stored columns.*multiple of 16.*Pad to 32"),
        ((20, 16), "2d", "rowwise", "20 stored rows.*multiple of 16.*Pad to 32"),
        ((64,), "dynamic", "rowwise", "1 dimensions.*at least 2.*unsqueeze"),
        ((16, 16), "dynamic", "diagonal", "'diagonal' is not.*Choose"),
    ],
)
def test_a_bad_shape_is_refused_with_the_rule_and_the_way_out(shape, spec, direction, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.zeros(shape), SPECS[spec], direction)


def test_the_transform_refuses_a_bad_shape():
    with pytest.raises(ValueError, match="dimension 24.*groups of 16.*Pad it to 32"):
        quantize(torch.zeros(24, 16), QuantizerSpec(rht="signed"), "columnwise")


def test_fp64_is_refused():
    with pytest.raises(ValueError, match="float64.*Cast"):
        quantize(torch.zeros(16, 16, dtype=torch.float64), SPECS["dynamic"])


@pytest.mark.parametrize(
    "options",
    [
        {"block_shape": (1, 32)},
        {"global_amax": "delayed"},
        {"rht": "on"},
        {"rounding": "up"},
        {"static_amax": 0.0},
        {"static_amax": math.inf},
        {"four_over_six": FourOverSix(), "rounding": "sr"},
        {"four_over_six": FourOverSix(), "rht": "signed"},
        {"row_scaled": True, "block_shape": (16, 16)},
        {"row_scaled": True, "rounding": "sr"},
        {"row_scaled": True, "global_amax": "static"},
    ],
)
def test_options_that_exclude_each_other_are_refused(options):
    with pytest.raises(ValueError, match="[.] (Choose|Drop|1.3125)"):
        QuantizerSpec(**options)


@pytest.mark.parametrize("options", [{"bound": 300}, {"error": "MAX"}])
def test_unknown_4over6_options_are_refused(options):
    with pytest.raises(ValueError, match="is not one of.*Choose"):
        FourOverSix(**options)


def test_stochastic_rounding_needs_exactly_one_source(generator):
    spec, x, draws = QuantizerSpec(rounding="sr"), sample(generator), random_bytes(generator, 32, 64)
    for sources in ({}, {"random_bytes": draws, "seed": 1}):
        with pytest.raises(ValueError, match="exactly one source"):
            quantize(x, spec, **sources)
    for wrong in (draws[:1], draws.int()):
        with pytest.raises(ValueError, match=r"Pass uint8 \(32, 64\)"):
            quantize(x, spec, random_bytes=wrong)
