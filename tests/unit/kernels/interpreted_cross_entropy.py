"""The Triton kernels of the cross entropy in the interpreter. test_rows_triton.py runs this with TRITON_INTERPRET=1."""

import dataclasses

import pytest
import torch
from cross_entropy_cases import FACTOR, assert_broken_logits_show, assert_padding_takes_no_part, check, make_inputs, ours, truth
from interpreted_rows import poison
from row_cases import error, kernels_for
from torch import Tensor

from ngpt.functional import scaled_cross_entropy
from ngpt.kernels.cross_entropy import eager, triton

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
# Tokens, vocabulary, columns that count: one of each, odd numbers, several tiles, none of the last tile, a whole tile of padding.
SHAPES = [(1, 1, 1), (5, 7, 7), (3, 70, 65), (37, 300, 257), (9, 256, 128), (2, 520, 100)]


@pytest.fixture(autouse=True)
def small_tiles_in_poisoned_memory(monkeypatch):
    monkeypatch.setattr(triton, "FORWARD", dataclasses.replace(triton.FORWARD, warps=1, elements=8))
    monkeypatch.setattr(triton, "BACKWARD", dataclasses.replace(triton.BACKWARD, warps=1, elements=16, resident=6))
    poison(monkeypatch)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("is_scaled", [True, False], ids=["ngpt", "control"])
def test_any_shape(dtype, is_scaled, generator):
    for shape in SHAPES:
        inputs = make_inputs(*shape, dtype, generator)
        assert not check(inputs if is_scaled else inputs | {"scale": None}), shape


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e4, 1e18])
def test_logits_of_any_size(size, generator):
    """Where exp of a logit alone is zero or infinite."""
    assert not check(make_inputs(7, 70, 65, FP32, generator, size))
    assert not check(make_inputs(7, 70, 65, BF16, generator, size) | {"scale": None})


def test_a_token_without_a_finite_logit_shows_it(generator):
    assert_broken_logits_show("cpu", generator)


def test_padding_takes_no_part(generator):
    assert_padding_takes_no_part("cpu", generator)


def test_logits_that_are_rows_of_wider_ones(generator):
    inputs = make_inputs(6, 70, 65, BF16, generator)
    wide = torch.cat((inputs["logits"], inputs["logits"]), 1)
    assert not check(inputs | {"logits": wide[:, 70:]})


def test_two_runs_give_the_same_bits(generator):
    inputs = make_inputs(37, 300, 257, BF16, generator)
    with kernels_for("cpu"):
        first, second = ours(**inputs), ours(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("is_scaled", [True, False], ids=["ngpt", "control"])
@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["kernels", "eager"])
def test_another_vector_on_the_way_back(devices, is_scaled, generator):
    """The gradient of the scaled logits times it; the scale's own gradient is as ever."""
    inputs = make_inputs(9, 70, 65, FP32, generator)
    other = torch.randn(70, generator=generator)
    expected = truth(**(inputs | {"scale": None} if not is_scaled else inputs))
    unscaled = expected[1] / (inputs["scale"].double() * FACTOR) if is_scaled else expected[1]
    with kernels_for(*devices):
        actual = ours(**(inputs if is_scaled else inputs | {"scale": None}), scale_of_grad=other)
    assert error(actual[1], unscaled * other.double()) < 1e-5
    assert not is_scaled or error(actual[2], expected[2]) < 1e-5


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["kernels", "eager"])
def test_the_gradient_takes_the_logits_place_once(devices, generator):
    inputs = make_inputs(5, 70, 65, BF16, generator)
    with kernels_for(*devices):
        leaf = inputs["logits"].requires_grad_()
        logits = leaf * 1
        squares = logits * logits  # saves them, too
        losses = scaled_cross_entropy(logits, inputs["targets"])
        (grad,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
        assert grad.data_ptr() == logits.data_ptr()
        with pytest.raises(RuntimeError, match="took their place"):
            losses.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squares.sum().backward()


class Ranks:
    """Stands for a process group; `dist.all_reduce` brings what the other ranks would."""

    def __init__(self, monkeypatch, others: list[Tensor]):
        self.others = others
        monkeypatch.setattr(torch.distributed, "all_reduce", self.all_reduce)

    def size(self) -> int:
        return 2

    def all_reduce(self, x: Tensor, op=torch.distributed.ReduceOp.SUM, group=None) -> None:
        other = self.others.pop(0)
        x.copy_(torch.maximum(x, other) if op == torch.distributed.ReduceOp.MAX else x + other)


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["kernels", "eager"])
@pytest.mark.parametrize("split", [24, 48, 66], ids=["both_count", "targets_of_one", "padding_alone"])
def test_a_vocabulary_split_between_two_ranks(devices, split, generator, monkeypatch):
    inputs = make_inputs(9, 72, 65, FP32, generator)
    inputs["targets"] = inputs["targets"].clamp(0, 64) % 48
    losses, grad, grad_scale = truth(**inputs)
    for mine in (slice(0, split), slice(split, 72)):
        theirs = slice(split, 72) if mine.start == 0 else slice(0, split)

        def part(of: slice) -> dict:
            columns = min(max(65 - of.start, 0), of.stop - of.start)
            return inputs | dict(
                logits=inputs["logits"][:, of], scale=inputs["scale"][of], targets=inputs["targets"] - of.start, columns=columns
            )

        other, own = part(theirs), part(mine)
        statistics = [eager.forward(x["logits"], x["scale"], FACTOR, x["targets"], x["columns"]) for x in (other, own)]
        top = torch.maximum(statistics[0][0], statistics[1][0])
        sums = torch.stack((statistics[0][1] * (statistics[0][0] - top).exp2(), statistics[0][2]))
        group = Ranks(monkeypatch, [statistics[0][0], sums])
        with kernels_for(*devices):
            actual = ours(**own, group=group)
        assert error(actual[0], losses) < 1e-6 and error(actual[1], grad[:, mine]) < 1e-5 and error(actual[2], grad_scale[mine]) < 1e-5
