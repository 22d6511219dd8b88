"""`emulate` on a CPU against the reference quantiser, bit by bit, and the interface that every backend has."""

import dataclasses

import pytest
import torch
from nvfp4_cases import DIRECTIONS, KINDS, SEED, SPECS, expected_values, matrix, same_bits, spec_name

from ngpt.kernels.nvfp4_quantize import eager, emulate, quantize_packed
from ngpt.precision import FourOverSix, QuantizerSpec, quantize

STATIC = QuantizerSpec(global_amax="static")


@pytest.mark.parametrize("spec", SPECS, ids=spec_name)
def test_values_and_counts_are_the_references(spec):
    for kind, dtype in ((kind, dtype) for kind in KINDS for dtype in (torch.float32, torch.bfloat16)):
        x, counters = matrix(kind, dtype=dtype), torch.full((2, 2), 100)
        for i, operand in enumerate(emulate(x, spec, seed=SEED, counters=counters)):
            values, amax, counts = expected_values(x, spec, DIRECTIONS[i], dtype)
            assert same_bits(operand.values, values), (kind, dtype, DIRECTIONS[i])
            assert amax is operand.global_amax is None or same_bits(operand.global_amax, amax)
            assert (counters[i] - 100).tolist() == counts


def test_pieces_of_any_height_give_the_same_bits(monkeypatch):
    x, spec = matrix("ordinary", 112, 64), QuantizerSpec(global_amax="dynamic_pow2", rht="signed", rounding="sr")
    whole = emulate(x, spec, seed=SEED)
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS", 48 * 64)
    assert all(same_bits(a.values, b.values) for a, b in zip(whole, emulate(x, spec, seed=SEED), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_exact_in_both_dtypes(dtype):
    x = matrix("ordinary")
    for spec in (STATIC, QuantizerSpec()):
        for operand, exact in zip(emulate(x, spec, dtype=dtype), emulate(x, spec, dtype=torch.float32), strict=True):
            assert operand.values.dtype == dtype and torch.equal(operand.values.float(), exact.values)


def test_square_blocks_share_one_operand():
    row, column = emulate(matrix("ordinary"), QuantizerSpec(block_shape=(16, 16)))
    assert row is column
    assert emulate(matrix("ordinary"), QuantizerSpec(block_shape=(16, 16)), rowwise=False)[0] is None
    rotated = emulate(matrix("ordinary"), QuantizerSpec(block_shape=(16, 16), rht="signed"))
    assert rotated[0] is not rotated[1]


@pytest.mark.parametrize("spec", [STATIC, QuantizerSpec(rht="signed"), QuantizerSpec(block_shape=(16, 16))], ids=spec_name)
def test_one_direction_alone_is_the_same(spec):
    x, counters = matrix("ordinary"), torch.zeros(2, 2, dtype=torch.int64)
    row, column = emulate(x, spec, counters=counters)
    alone = torch.zeros(2, 2, dtype=torch.int64)
    assert same_bits(emulate(x, spec, columnwise=False, counters=alone)[0].values, row.values)
    assert emulate(x, spec, columnwise=False)[1] is None
    assert alone[1].tolist() == [0, 0]
    assert same_bits(emulate(x, spec, rowwise=False, counters=alone)[1].values, column.values)
    assert torch.equal(alone, counters)


@pytest.mark.parametrize("spec", [QuantizerSpec(four_over_six=FourOverSix()), QuantizerSpec(row_scaled=True)], ids=["4over6", "row_scaled"])
def test_options_without_a_recipe_work(spec):
    x, counters = matrix("ordinary"), torch.zeros(2, 2, dtype=torch.int64)
    for operand, direction in zip(emulate(x, spec, counters=counters), DIRECTIONS, strict=True):
        truth = quantize(x, spec, direction)
        assert torch.equal(operand.values if direction == "rowwise" else operand.values.t(), truth.decode())
        assert torch.equal(operand.global_amax, truth.global_amax) and operand.e4m3_bound == spec.e4m3_bound


def test_strides_and_leading_dimensions_do_not_matter():
    x = matrix("ordinary")
    for view in (x.t().contiguous().t(), torch.cat((x, x), 1)[:, :96], x.view(3, 16, 96)):
        for spec in (STATIC, QuantizerSpec(rht="signed")):
            assert all(same_bits(a.values, b.values) for a, b in zip(emulate(view, spec), emulate(x, spec), strict=True))


def test_no_rows_are_fine():
    row, column = emulate(torch.zeros(0, 32), QuantizerSpec(rht="signed"))
    assert row.values.shape == column.values.shape == (0, 32)


def test_packed_is_the_reference_in_both_directions():
    x, spec = matrix("ordinary").view(3, 16, 96), QuantizerSpec(rounding="sr")
    for packed, direction in zip(quantize_packed(x, spec, seed=SEED), DIRECTIONS, strict=True):
        assert packed.same_as(quantize(x, spec, direction, seed=SEED))
    assert quantize_packed(x, spec, columnwise=False, seed=SEED)[1] is None


@pytest.mark.parametrize("call", [emulate, quantize_packed])
@pytest.mark.parametrize(
    ("shape", "spec", "directions", "message"),
    [
        ((16, 24), STATIC, {}, "24 stored columns.*multiple of 16.*Pad to 32"),
        ((24, 16), STATIC, {}, "24 stored columns.*multiple of 16.*Pad to 32"),
        ((20, 16), QuantizerSpec(block_shape=(16, 16)), {"columnwise": False}, "20 stored rows.*multiple of 16.*Pad to 32"),
        ((64,), STATIC, {}, "1 dimensions.*at least 2.*unsqueeze"),
        ((16, 16), QuantizerSpec(rounding="sr"), {}, "seed: None.*stream_seed"),
    ],
)
def test_what_cannot_be_quantised_is_refused_with_the_way_out(call, shape, spec, directions, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(shape), spec, **directions)


def test_rowwise_alone_takes_any_number_of_rows():
    assert emulate(torch.ones(5, 32), STATIC, columnwise=False)[0].values.shape == (5, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_dtype_that_would_round_is_refused(dtype):
    with pytest.raises(ValueError, match="exact in fp32 and bf16"):
        emulate(torch.zeros(16, 16), STATIC, dtype=dtype)


def test_stochastic_values_lie_next_to_the_input_and_depend_on_the_seed():
    x, spec = torch.rand(64, 64, generator=torch.Generator().manual_seed(8)) - 0.5, dataclasses.replace(STATIC, rounding="sr")
    first, again, other = (emulate(x, spec, seed=seed)[0].values for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert ((first - x).abs() <= x.abs().view(64, 4, 16).amax(2, keepdim=True).expand(64, 4, 16).reshape(64, 64) / 3 * 1.07).all()
