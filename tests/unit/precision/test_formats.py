"""E2M1 and E4M3 against torch's own fp8 cast and against a search for the nearest value."""

import math

import pytest
import torch

from ngpt.precision.formats import (
    E2M1_VALUES,
    decode_e2m1,
    decode_e4m3,
    encode_e2m1,
    encode_e2m1_stochastic,
    encode_e4m3,
    pack_e2m1,
    power_of_two,
    unpack_e2m1,
)

ALL_CODES = torch.arange(16, dtype=torch.uint8)
ALL_BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)


def nearest_even_code(value: float) -> int:
    """The nearest of the eight magnitudes, among equally near ones the even code."""
    magnitude = min(abs(value), 6.0)
    code = min(range(8), key=lambda code: (abs(E2M1_VALUES[code] - magnitude), code % 2))
    return code + (8 if math.copysign(1.0, value) < 0 else 0)


def adversarial_values(grid: list[float]) -> torch.Tensor:
    """Grid points, midpoints and their fp32 neighbours, with both signs."""
    points = sorted({abs(value) for value in grid})
    points += [(a + b) / 2 for a, b in zip(points, points[1:], strict=False)]
    base = torch.tensor(points, dtype=torch.float32)
    inf = torch.tensor(math.inf)
    near = torch.cat((base, torch.nextafter(base, inf), torch.nextafter(base, -inf), torch.tensor([1e-45, 1e30, math.inf])))
    return torch.cat((near, -near))


def test_e2m1_takes_the_nearest_value_and_the_even_code_of_a_tie():
    random = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 3
    values = torch.cat((adversarial_values(list(E2M1_VALUES)), random))
    assert encode_e2m1(values).tolist() == [nearest_even_code(value) for value in values.tolist()]


def test_e2m1_ties_of_the_specification():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    assert decode_e2m1(encode_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


def test_e2m1_codes_survive_a_round_trip():
    assert torch.equal(encode_e2m1(decode_e2m1(ALL_CODES)), ALL_CODES)


def test_e2m1_nan_is_zero_to_nearest_and_six_stochastically():
    nan = torch.tensor([math.nan, -math.nan])
    assert encode_e2m1(nan).tolist() == [0, 0]
    assert encode_e2m1_stochastic(nan, torch.zeros(2)).tolist() == [7, 7]


def test_even_element_lies_in_the_low_nibble():
    assert pack_e2m1(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    assert torch.equal(unpack_e2m1(ALL_BYTES.view(1, -1)).view(-1, 2), torch.stack((ALL_BYTES & 15, ALL_BYTES >> 4), 1))


def test_odd_number_of_codes_cannot_be_packed():
    with pytest.raises(ValueError, match="last dimension 3.*even.*Pad"):
        pack_e2m1(torch.zeros(2, 3, dtype=torch.uint8))


def test_e4m3_decodes_as_torch_does():
    torch.testing.assert_close(decode_e4m3(ALL_BYTES), ALL_BYTES.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)


def test_e4m3_rounds_as_torch_does_and_saturates():
    grid = [value for value in decode_e4m3(ALL_BYTES).tolist() if not math.isnan(value)]
    random = torch.exp2(torch.empty(20000).uniform_(-14, 10, generator=torch.Generator().manual_seed(0)))
    values = torch.cat((adversarial_values(grid), random, -random))
    assert torch.equal(encode_e4m3(values), values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


def test_e4m3_of_the_specification():
    values = torch.tensor([0.0, 2.0**-10, 2.0**-9, 2.0**-6, 448.0, 464.0, 1e9, math.inf, math.nan])
    assert encode_e4m3(values).tolist() == [0, 0, 1, 8, 0x7E, 0x7E, 0x7E, 0x7E, 0x7F]


def test_power_of_two_is_exact():
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    assert power_of_two(exponents).tolist() == [2.0**exponent for exponent in exponents.tolist()]


def test_stochastic_rounding_keeps_grid_points_whatever_the_random_number():
    grid = decode_e2m1(ALL_CODES)
    for uniforms in (torch.zeros(16), torch.full((16,), 255 / 256), torch.full((16,), 1 - 2.0**-17)):
        assert torch.equal(encode_e2m1_stochastic(grid, uniforms), ALL_CODES)


def test_stochastic_rounding_goes_up_as_often_as_the_distance_says():
    """All 256 random bytes: the number of upward roundings is the distance to the lower neighbour in 256ths."""
    uniforms = torch.arange(256, dtype=torch.float32) / 256
    for low, high in zip(E2M1_VALUES, E2M1_VALUES[1:], strict=False):
        for eighth in range(8):
            value = low + (high - low) * eighth / 8
            rounded = decode_e2m1(encode_e2m1_stochastic(torch.full((256,), value), uniforms))
            assert set(rounded.tolist()) <= {low, high}
            assert (rounded == high).sum() == 32 * eighth
