"""The causal convolution against its definition in fp64, token by token, forward and backward."""

import pytest
import torch
from reference_mamba import causal_conv as definition
from torch import Tensor

from ngpt.functional.causal_conv import causal_conv_silu

BF16_ROUNDING = 2**-8  # of a correctly rounded value, relative


def make_inputs(length=9, features=5, width=4, batch=2, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    shapes = (batch, length, features), (features, width), (features,)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def results(function, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(8)).bfloat16().to(out.dtype)  # the same in every dtype
    return [out.detach(), *torch.autograd.grad((weights * out).sum(), leaves)]


def error(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 4, 9])
def test_output_and_gradients_are_those_of_the_definition(length, width):
    inputs = make_inputs(length, width=width)
    for actual, truth in zip(results(causal_conv_silu, inputs), results(definition, inputs), strict=True):
        assert error(actual, truth) < 1e-13


@pytest.mark.parametrize("length", [2, 9])
def test_documents_do_not_see_each_other(length):
    seq_idx = torch.tensor([[0, 0, 1, 2, 2, 2, 2, 2, 2], [4, 5, 5, 5, 5, 5, 5, 6, 6]], dtype=torch.int32)[:, :length]
    inputs = make_inputs(length)
    actual = results(lambda *values: causal_conv_silu(*values, seq_idx), inputs)
    for got, truth in zip(actual, results(lambda *values: definition(*values, seq_idx), inputs), strict=True):
        assert error(got, truth) < 1e-13


def test_gradients_agree_with_finite_differences():
    leaves = [value.requires_grad_() for value in make_inputs(length=4, features=2, batch=1)]
    for seq_idx in (None, torch.tensor([[0, 0, 1, 1]])):
        assert torch.autograd.gradcheck(lambda *values, seq_idx=seq_idx: causal_conv_silu(*values, seq_idx), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_as_near_to_fp64_as_the_definition(dtype):
    inputs = make_inputs(length=40, features=33, dtype=dtype)
    truth = results(definition, [value.double() for value in inputs])
    for actual, eager, exact in zip(results(causal_conv_silu, inputs), results(definition, inputs), truth, strict=True):
        assert actual.dtype == dtype
        assert error(actual, exact) <= 2 * error(eager, exact) + 1e-5


def test_bf16_output_and_gradients_are_the_fp64_values_rounded_once():
    inputs = make_inputs(length=40, features=33, dtype=torch.bfloat16)
    truths = results(definition, [value.double() for value in inputs])
    for actual, truth in zip(results(causal_conv_silu, inputs), truths, strict=True):
        assert ((actual.double() - truth).abs() <= truth.abs() * BF16_ROUNDING * 1.001 + 1e-6 * truth.abs().max()).all()


def test_later_tokens_reach_no_earlier_output():
    x, weight, bias = make_inputs()
    changed = x.clone()
    changed[:, 5:] += 1
    before, after = causal_conv_silu(x, weight, bias), causal_conv_silu(changed, weight, bias)
    assert torch.equal(before[:, :5], after[:, :5]) and before[:, 5:].ne(after[:, 5:]).all()
