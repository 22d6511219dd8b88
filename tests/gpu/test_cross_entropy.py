"""The cross entropy's kernels on a GPU, at the vocabularies and micro-batches of the models, against fp64."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "kernels"))
from cross_entropy_cases import assert_broken_logits_show, assert_padding_takes_no_part, check, make_inputs, ours, truth  # noqa: E402
from row_cases import error, kernels_for, problems  # noqa: E402

pytestmark = pytest.mark.gpu
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("is_scaled", [True, False], ids=["ngpt", "control"])
@pytest.mark.parametrize("shape", [(1, 257, 257), (63, 384, 257), (700, 50304, 50257), (1024, 131072, 131072), (33, 32775, 32771)], ids=str)
def test_losses_and_gradients(shape, is_scaled, dtype, generator):
    inputs = make_inputs(*shape, dtype, generator)
    assert not check(inputs if is_scaled else inputs | {"scale": None})


@pytest.mark.parametrize("size", [1e-20, 1e4, 1e18])
def test_logits_of_any_size(size, generator):
    """Fails where the two passes round the scaled logits differently."""
    assert not check(make_inputs(33, 1030, 1025, FP32, generator, size))
    assert not check(make_inputs(33, 1030, 1025, BF16, generator, size) | {"scale": None})


def test_broken_logits_and_padding(generator):
    assert_broken_logits_show("cuda", generator)
    assert_padding_takes_no_part("cuda", generator)


def test_another_vector_on_the_way_back_and_rows_with_strides(generator):
    inputs = make_inputs(65, 1030, 1025, FP32, generator) | {"scale": None}
    other = torch.randn(1030, generator=generator, device="cuda")
    inputs["logits"] = torch.cat((inputs["logits"], inputs["logits"]), 1)[:, 1030:]
    losses, grad = ours(**inputs, scale_of_grad=other)
    wanted = truth(**inputs)
    assert error(losses, wanted[0]) < 1e-6 and error(grad, wanted[1] * other.double()) < 1e-5


def test_more_logits_than_32_bits_count(generator):
    """16,400 tokens of 131,072 entries; the truth some rows at a time."""
    inputs = make_inputs(16400, 131072, 131000, BF16, generator)
    results = []
    for devices in (("cuda",), ()):
        with kernels_for(*devices):
            results.append(ours(**inputs))
    names, grad_scale = ["losses", "gradient of the logits"], 0
    for first in range(0, 16400, 1025):
        rows = slice(first, first + 1025)
        part = {name: value[rows] if name in ("logits", "targets", "grad") else value for name, value in inputs.items()}
        *wanted, of_rows = truth(**part)
        grad_scale += of_rows
        assert not problems(names, *([value[rows] for value in result[:2]] for result in results), wanted)
    assert error(results[0][2], grad_scale) <= 2 * error(results[1][2], grad_scale) + 1e-5


def test_two_runs_give_the_same_bits(generator):
    inputs = make_inputs(2048, 131072, 131072, BF16, generator)
    first, second = ours(**inputs), ours(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
