"""The axis along which each expert's matrix has unit norm is the one of length D, in grouped linears too."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_ext.layers.linear import NormalizedWritesStream, ReadsStream, WritesStream

D, F = 6, 10


def backend(rows: int, columns: int) -> type:
    """In place of Transformer Engine's: one weight [out, in] for each expert."""

    class Linear(nn.Module):
        def __init__(self, num_gemms: int, **_):
            super().__init__()
            self.matrices = nn.ParameterList([nn.Parameter(torch.empty(rows, columns)) for _ in range(num_gemms)])

    return Linear


@pytest.mark.parametrize(
    ("mixin", "shape"),
    [(ReadsStream, (F, D)), (WritesStream, (D, F)), (NormalizedWritesStream, (D, F))],
)
def test_the_marked_axis_has_length_d(mixin, shape):
    linear = type("Grouped", (mixin, backend(*shape)), {})(
        2, config=SimpleNamespace(hidden_size=D, params_dtype=torch.float32), pg_collection=SimpleNamespace(expt_tp=None)
    )
    assert [weight.shape[weight.unit_dim] for weight in linear.matrices] == [D, D]
