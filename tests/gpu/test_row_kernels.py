"""The row-wise kernels on a GPU, at the shapes that tests/bench/row_kernels.py measures, against fp64."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("bench", "unit/kernels")]
from row_cases import OPERATIONS, check, kernels_for, problems, value_and_gradients  # noqa: E402
from row_kernels import CASES, Case, make  # noqa: E402

pytestmark = pytest.mark.gpu
BF16, FP32 = torch.bfloat16, torch.float32
LOGITS = (16400, 131072)  # more than 2^31 elements
OF_ROWS = [case for case in CASES if case.shape[-1] < 100_000]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("case", OF_ROWS, ids=lambda case: case.name)
def test_value_and_gradients(case, dtype):
    assert not check(case.operation, *make(case, dtype, 3), *case.sizes())


@pytest.mark.parametrize("case", OF_ROWS, ids=lambda case: case.name)
def test_two_runs_give_the_same_bits(case):
    inputs, grad = make(case, BF16, 4)
    runs = [value_and_gradients(OPERATIONS[case.operation][0], inputs, grad, *case.sizes()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_more_logits_than_32_bits_count(columns: int = 8192):
    """The truth some columns at a time: all of it would not fit in memory."""
    (x, scale), grad = make(Case("scale_features", LOGITS), BF16, 3)
    ours, plain = OPERATIONS["scale_features"]
    results = []
    for devices in (("cuda",), ()):
        with kernels_for(*devices):
            results.append(value_and_gradients(ours, [x, scale], grad))
    for begin in range(0, LOGITS[1], columns):
        part = slice(begin, begin + columns)
        truth = value_and_gradients(plain, [x[:, part].double(), scale[part].double()], grad[:, part].double())
        assert not problems(["value", "gradient 0", "gradient 1"], *([t[..., part] for t in result] for result in results), truth)
