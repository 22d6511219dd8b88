"""The kernel of the experts' weight gradients in the interpreter. test_grouped_gradient.py runs this with TRITON_INTERPRET=1."""

import pytest
import torch
from grouped_gradient_cases import check, make_inputs, problems_of_expert, run

from ngpt.kernels.grouped_gradient import triton

BF16, FP16 = torch.bfloat16, torch.float16
SIZES = [0, 5, 0, 8, 1, 19, 0]  # of groups, in blocks of 8 rows
SHAPES = [(1, 1), (40, 16), (7, 33)]  # N and K, in tiles of 16: below one, odd, whole


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(triton, "EDGE", 16)
    monkeypatch.setattr(triton, "ROWS", 8)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_tiles_that_are_not_whole(n, k, generator):
    assert not check(make_inputs([0, 9, 5], n, k, BF16, generator), "cpu")


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_uneven_and_empty_groups(dtype, generator):
    assert not check(make_inputs(SIZES, 24, 8, dtype, generator), "cpu")


@pytest.mark.parametrize("sizes", [[16], [0, 0], [0, 0, 9]], ids=str)
def test_few_groups(sizes, generator):
    assert not check(make_inputs(sizes, 16, 8, BF16, generator), "cpu")


def test_a_total_that_is_not_aligned(generator):
    assert not check(make_inputs([3, 12], 24, 8, BF16, generator, offset=1), "cpu")


def test_calls_add_up(generator):
    inputs = make_inputs([3, 12], 24, 8, BF16, generator)
    total, dy, x, _ = inputs
    found = run(inputs, "cpu", calls=2)
    for expert, rows in enumerate((slice(0, 3), slice(3, 15))):
        assert not problems_of_expert(found[expert], total[expert], dy[rows].repeat(2, 1), x[rows].repeat(2, 1))


def test_fp32_goes_through_plain_torch(generator, monkeypatch):
    monkeypatch.setattr(triton, "add_gradients", None)
    assert not check(make_inputs([3, 12], 24, 40, torch.float32, generator), "cpu")
