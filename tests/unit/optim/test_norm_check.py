"""The self-check of norms sees what is wrong, whatever stands beside it."""

import math

import pytest
import torch

from megatron_ext.optim.norm_check import worst_norm_deviation
from ngpt.optim.retraction import mark


def matrix(values: torch.Tensor, unit_dim: int | None = 1) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(values)
    if unit_dim is not None:
        mark(weight, unit_dim)
    return weight


def test_names_the_worst_matrix_and_its_deviation():
    stretched = torch.eye(4)
    stretched[2] *= 1.25
    found = worst_norm_deviation(
        [("good", matrix(torch.eye(4)), None), ("bad", matrix(stretched), None), ("free", matrix(stretched * 9, None), None)]
    )
    assert found == (pytest.approx(0.25), "bad")


@pytest.mark.parametrize("order", [("nan", "good"), ("good", "nan")])
def test_a_nan_is_infinite_wherever_it_stands(order):
    weights = {"good": matrix(torch.eye(3)), "nan": matrix(torch.full((3, 3), math.nan))}
    assert worst_norm_deviation([(name, weights[name], None) for name in order]) == (math.inf, "nan")


def test_masters_are_looked_at_where_they_exist():
    weight = matrix(torch.eye(3, dtype=torch.bfloat16))
    weight.main_param = 2 * torch.eye(3)
    assert worst_norm_deviation([("w", weight, None)])[0] == pytest.approx(1.0)


def test_every_one_of_stacked_matrices_is_looked_at_on_its_own():
    stacked = torch.cat([torch.eye(3), torch.eye(3)[:, [1, 2, 0]]])
    weight = torch.nn.Parameter(stacked)
    mark(weight, unit_dim=0, num_matrices=2)
    assert worst_norm_deviation([("experts", weight, None)]) == (0.0, "no marked matrix")
    stacked[4] *= 1.5
    assert worst_norm_deviation([("experts", weight, None)]) == (pytest.approx(0.5), "experts")
