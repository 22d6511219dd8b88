"""Weights quantised once a training step: operands never belong to other weights than the present ones."""

import pytest
import torch

from megatron_ext.precision.weights import StepWeights
from ngpt.config import compose
from ngpt.config.recipes import recipe_of
from ngpt.kernels.nvfp4_quantize import emulate

FP32 = torch.float32


def recipe(*overrides: str):
    return recipe_of(compose(["experiment=ngpt_tiny", *overrides]).precision)


PAPER = recipe("precision=nvfp4_paper")


@pytest.fixture
def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(5)), dim=-1))


def test_a_weight_is_quantised_once_a_step_and_anew_in_the_next(weight):
    weights = StepWeights(keeps=True)
    with weights.training_step():
        row, column = weights.operands(weight, PAPER, FP32)
        assert row is column is weights.operands(weight, PAPER, FP32)[0]
    weight.data.mul_(0.9)
    with weights.training_step():
        moved = weights.operands(weight, PAPER, FP32)[0]
    assert torch.equal(moved.values, emulate(weight.detach(), PAPER.weight, dtype=FP32)[0].values)
    assert not torch.equal(moved.values, row.values)


def test_weights_of_one_shape_have_operands_of_their_own(weight):
    weights, other = StepWeights(keeps=True), torch.nn.Parameter(weight.detach() * 0.5)
    with weights.training_step():
        found = [weights.operands(one, PAPER, FP32)[0].values for one in (weight, other, weight)]
    assert found[0] is found[2] and not torch.equal(found[0], found[1])


def test_nothing_is_kept_outside_of_steps_behind_a_failed_one_and_where_it_is_not_wanted(weight):
    weights = StepWeights(keeps=True)
    assert weights.operands(weight, PAPER, FP32) is None
    with pytest.raises(OSError), weights.training_step():
        assert weights.operands(weight, PAPER, FP32) is not None
        raise OSError
    assert weights.operands(weight, PAPER, FP32) is None
    unwanted = StepWeights(keeps=False)
    with unwanted.training_step():
        assert unwanted.operands(weight, PAPER, FP32) is None


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        (["precision=bf16"], 0),
        (["precision=nvfp4_paper"], 1),
        (["precision=nvfp4_nvidia"], 1),
        (["precision=nvfp4_four_over_six"], 1),
        (["precision=nvfp4_nvidia", "precision.weight_blocks=1x16"], 2),
        (["precision=nvfp4_nvidia", "precision.operands.weight_columnwise={blocks: 1x16, rounding: stochastic}"], 0),
    ],
)
def test_a_recipe_knows_how_many_operands_a_weight_has_and_that_stochastic_ones_are_not_kept(overrides, number, weight):
    weights, quantised = StepWeights(keeps=True), recipe(*overrides)
    assert quantised.weight_operands == number
    with weights.training_step():
        operands = weights.operands(weight, quantised, FP32)
    assert (operands is None) == (number == 0)
    assert operands is None or len({id(operand) for operand in operands}) == number
