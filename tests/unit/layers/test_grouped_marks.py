"""The axis along which each expert's matrix has unit norm is the one of length D, in grouped linears too."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_ext.layers.linear import NormalizedWritesStream, ReadsStream, WritesStream

D, F = 6, 10


def backend(rows: int, columns: int) -> type:
    """In place of the real one: the weights [out, in] of all experts, stacked."""

    class Linear(nn.Module):
        def __init__(self, num_gemms: int, **_):
            super().__init__()
            self.num_matrices = num_gemms
            self.weight = nn.Parameter(torch.empty(num_gemms * rows, columns))

    return Linear


@pytest.mark.parametrize(
    ("mixin", "shape"),
    [(ReadsStream, (F, D)), (WritesStream, (D, F)), (NormalizedWritesStream, (D, F))],
)
def test_the_marked_axis_has_length_d(mixin, shape):
    linear = type("Grouped", (mixin, backend(*shape)), {})(
        2, config=SimpleNamespace(hidden_size=D, params_dtype=torch.float32), pg_collection=SimpleNamespace(expt_tp=None)
    )
    assert linear.weight.num_matrices == 2
    assert linear.weight.view(2, *shape).size(1 + linear.weight.unit_dim) == D
