"""The Triton kernels in the interpreter, bit by bit against the reference. test_nvfp4_triton.py runs this with TRITON_INTERPRET=1."""

import dataclasses

import pytest
import torch
from nvfp4_cases import DIRECTIONS, SEED, SPECS, expected_values, folds, matrix, same_bits, spec_name

from ngpt.kernels.nvfp4_quantize import triton
from ngpt.precision import QuantizerSpec, quantize
from ngpt.precision.quantize import as_matrix

# Small tiles, so that the matrices below have several, some of them cut off.
SMALL = {"strips": 2, "columns": 64}
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name in ("DEQUANTIZED", "STOCHASTIC", "ROTATED", "PACKED", "AMAX"):
        monkeypatch.setattr(triton, name, dataclasses.replace(getattr(triton, name), **SMALL))


def check_values(x: torch.Tensor, spec: QuantizerSpec, dtype: torch.dtype, wanted: tuple[bool, bool] = (True, True)) -> None:
    counters = torch.zeros(2, 2, dtype=torch.int64)
    results = triton.quantize_dequantize(as_matrix(x), spec, wanted, dtype, folds(spec), SEED, counters)
    for i, direction in enumerate(DIRECTIONS):
        if not wanted[i]:
            assert results[i] is None and counters[i].tolist() == [0, 0]
            continue
        values, amax, counts = expected_values(x, spec, direction, dtype)
        assert same_bits(results[i][0], values), direction
        assert amax is results[i][1] is None or same_bits(results[i][1], amax)
        assert counters[i].tolist() == counts


def check_packed(x: torch.Tensor, spec: QuantizerSpec, wanted: tuple[bool, bool] = (True, True)) -> None:
    seed = SEED if spec.rounding == "sr" else None
    for i, packed in enumerate(triton.quantize_packed(as_matrix(x), spec, wanted, tuple(x.shape), seed)):
        if not wanted[i]:
            assert packed is None
            continue
        truth = quantize(x, spec, DIRECTIONS[i], seed=seed)
        assert packed.same_as(truth) and packed.counters() == truth.counters()
        counts = (truth.block_decode_scale != 0).repeat_interleave(8, dim=1)  # under a scale of zero codes mean nothing
        assert torch.equal(packed.codes * counts, truth.codes * counts)  # signs of zeros included


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.rht != "unsigned"], ids=spec_name)
def test_ordinary_values(spec):
    check_values(matrix("ordinary", 48, 48), spec, FP32)
    check_packed(matrix("ordinary", 48, 48, BF16), spec)


@pytest.mark.parametrize("kind", ["nan", "inf", "tiny"])
@pytest.mark.parametrize(
    "spec",
    [
        QuantizerSpec(),
        QuantizerSpec(global_amax="dynamic_pow2", rounding="sr"),
        QuantizerSpec(global_amax="static"),
        QuantizerSpec(block_shape=(16, 16), rht="unsigned"),
    ],
    ids=spec_name,
)
def test_special_values(spec, kind):
    check_values(matrix(kind, 32, 48, BF16), spec, FP32)
    check_packed(matrix(kind, 32, 48), spec)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=DIRECTIONS)
@pytest.mark.parametrize("spec", [QuantizerSpec(), QuantizerSpec(block_shape=(16, 16)), QuantizerSpec(rht="signed")], ids=spec_name)
def test_one_direction(spec, wanted):
    check_values(matrix("ordinary", 48, 80), spec, BF16, wanted)
    check_packed(matrix("ordinary", 48, 80), spec, wanted)


def test_tiles_that_fill_the_matrix_take_no_masks():
    check_values(matrix("ordinary", 64, 64), QuantizerSpec(global_amax="dynamic_pow2", rounding="sr"), BF16)
    check_packed(matrix("ordinary", 64, 64), QuantizerSpec())


def test_strides_dimensions_and_fp16():
    check_values(matrix("ordinary", 48, 48).t(), QuantizerSpec(), FP32)
    check_packed(matrix("ordinary", 48, 48).view(3, 16, 48), QuantizerSpec())
    check_values(matrix("ordinary", 48, 48).clamp(-1, 1).half(), QuantizerSpec(global_amax="static"), BF16)


def test_a_matrix_without_rows():
    for result in triton.quantize_dequantize(torch.zeros(0, 32), QuantizerSpec(), (True, True), BF16, False, None, None):
        assert result[0].shape == (0, 32)
