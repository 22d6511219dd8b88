"""Run by test_rows_triton.py under Triton's interpreter: queries, keys and values from mixed heads, against fp64."""

import dataclasses

import pytest
import torch
from interpreted_rows import poison
from rotary_cases import Case, check, make_inputs, ours, strided, truth, with_heads_of_size
from row_cases import ROWS, kernels_for

from ngpt.functional import split_heads
from ngpt.kernels.rotary import triton as tilings

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def small_tiles_in_poisoned_memory(monkeypatch):
    """Tiles of some tokens, fewer than there are."""
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(tilings, name, dataclasses.replace(getattr(tilings, name), warps=1, elements=1, resident=1))
    tilings._plan.cache_clear()
    poison(monkeypatch)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


# Of the tests' models; one key for all; a key for each, and part of a head turns; heads of odd widths; one token; one number.
CASES = [
    Case(4, 2, 16, 16),
    Case(5, 1, 6, 6),
    Case(3, 3, 12, 8, batch=1),
    Case(2, 1, 7, 4, batch=3),
    Case(2, 2, 7, 0),
    Case(1, 1, 2, 2, sequence=1, batch=1),
    Case(2, 2, 1, 0, batch=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, generator):
    inputs = make_inputs(case, FP32, generator)
    assert not check(inputs)
    assert not check(dataclasses.replace(inputs, scale=None))
    assert not check(inputs.to(BF16))


@pytest.mark.parametrize("shares", [1, 3])
def test_programs_that_share_the_groups(shares, generator, monkeypatch):
    most = 1 if shares == 1 else 10_000
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(tilings, name, dataclasses.replace(getattr(tilings, name), resident=most))
    inputs = make_inputs(Case(6, 3, 16, 16), FP32, generator)
    assert tilings._plan(tilings.FORWARD, 6, 6, 3, 16, 16, True, inputs.mixed.device).grid == (2, shares, 1)
    assert not check(inputs)


def test_heads_of_any_size(generator):
    for kind, size in ROWS.items():
        assert not check(with_heads_of_size(make_inputs(Case(2, 1, 16, 16), FP32, generator), size)), kind


def test_gradients_with_strides_and_heads_within_wider_rows(generator):
    inputs = make_inputs(Case(2, 1, 8, 8), BF16, generator)
    for number, other in enumerate(strided(inputs)):
        assert not check(other), number
    assert not check(dataclasses.replace(strided(inputs)[0], scale=None))
    wide = torch.cat((inputs.mixed, inputs.mixed), -1)
    assert not check(dataclasses.replace(inputs, mixed=wide[..., inputs.mixed.size(-1) :]))
    assert not check(dataclasses.replace(inputs, mixed=inputs.mixed.transpose(0, 1).contiguous().transpose(0, 1)))


def test_two_runs_give_the_same_bits_and_leave_the_inputs(generator):
    inputs = make_inputs(Case(4, 2, 16, 16), BF16, generator)
    tensors = inputs.mixed, inputs.scale, inputs.angles, *inputs.grads
    copies = [x.clone() for x in tensors]
    with kernels_for("cpu"):
        first, second = ours(inputs), ours(inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_values_are_rounded_once(generator):
    """Fails where a head is rounded between its rotation and its norm."""
    inputs = make_inputs(Case(2, 1, 16, 16), BF16, generator)
    with kernels_for("cpu"):
        actual = ours(inputs)
    for a, t in zip(actual[:3], truth(inputs)[:3], strict=True):
        assert ((a.double() - t).abs() <= t.abs() * 2**-8 * 1.001 + 1e-6).all()


def test_no_tokens_and_wide_numbers_stay_eager(generator, monkeypatch):
    for name in ("forward", "backward"):
        monkeypatch.setattr(tilings, name, lambda *args, name=name: pytest.fail(name))
    with kernels_for("cpu"):
        ours(make_inputs(Case(4, 2, 16, 16), FP32, generator).to(torch.float64))
        empty = ours(make_inputs(Case(4, 2, 16, 16, sequence=0), BF16, generator))
        split_heads(torch.ones(1, 1, 3 * 1040), 1, 1)
    assert [x.numel() for x in empty[:4]] == [0] * 4 and empty[4].eq(0).all()
