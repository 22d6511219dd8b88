"""Queries, keys and values from mixed heads in plain torch: against fp64 autograd of complex products, and Megatron's own rotation."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from rotary_cases import Case, Inputs, make_inputs, ours, strided, truth, with_heads_of_size  # noqa: E402
from row_cases import ROWS, error, kernels_for  # noqa: E402

from ngpt.functional import split_heads  # noqa: E402

# Largest error, relative to the largest number: rounding once, and what fp32 sums lose. Of bf16 gradients the scale's is fp32.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8}
CASES = [Case(4, 2, 16, 16), Case(5, 1, 6, 6), Case(3, 3, 12, 8), Case(2, 1, 7, 0), Case(1, 1, 2, 2, sequence=1, batch=1)]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def assert_true(inputs: Inputs) -> None:
    with kernels_for():
        actual = ours(inputs)
    for a, t in zip(actual, truth(inputs), strict=True):
        assert a.shape == t.shape and error(a, t) < BOUNDS[inputs.mixed.dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype, generator):
    inputs = make_inputs(case, torch.float64, generator).to(dtype)
    assert_true(inputs)
    assert_true(replace(inputs, scale=None))
    for other in strided(inputs):
        assert_true(other)


def test_strides_of_the_gradients_change_no_bit(generator):
    """Recomputed attention gives its gradients with other strides than attention that is kept."""
    inputs = make_inputs(Case(8, 2, 32, 32, sequence=65), torch.float32, generator)
    wanted = ours(inputs)
    for other in strided(inputs)[:3]:
        assert all(map(torch.equal, ours(other), wanted))


@pytest.mark.parametrize("size", ROWS.values(), ids=ROWS)
def test_heads_of_any_size(size, generator):
    assert_true(with_heads_of_size(make_inputs(Case(4, 2, 16, 16), torch.float64, generator).to(torch.float64), size))


@pytest.mark.parametrize("rotated", [16, 8])
def test_the_rotation_is_megatrons(rotated, generator):
    inputs = make_inputs(Case(2, 1, 16, rotated, is_scaled=False), torch.float32, generator)
    q, k, v = split_heads(inputs.mixed, 2, 1, inputs.angles)
    heads = inputs.mixed.unflatten(-1, (4, 16))
    wanted = _apply_rotary_pos_emb_bshd(heads, inputs.angles)
    torch.testing.assert_close(torch.cat((q, k), 2), wanted[:, :, :3], rtol=0, atol=1e-6)
    assert torch.equal(v, heads[:, :, 3:])


def test_angles_of_another_length_are_refused(generator):
    inputs = make_inputs(Case(2, 1, 16, 16), torch.float32, generator)
    with pytest.raises(ValueError, match="angles: 2 positions, and mixed has 3"):
        split_heads(inputs.mixed, 2, 1, inputs.angles[:2])
