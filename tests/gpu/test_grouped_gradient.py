"""The kernel of the experts' weight gradients on a GPU, at the sizes of the models, against fp64."""

import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "kernels"))
from grouped_gradient_cases import check, make_inputs, problems_of_expert, run  # noqa: E402

from ngpt.kernels.grouped_gradient import add_gradients  # noqa: E402

pytestmark = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16
UNEVEN = [0, 5000, 1, 770, 63, 0, 64, 65, 1540, 3000, 127, 0, 129, 800, 2, 0]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1856, 1024), (1024, 1856), (1856, 2688), (2688, 1856)])
def test_sizes_of_the_models(n, k, dtype, generator):
    assert not check(make_inputs(UNEVEN, n, k, dtype, generator), "cuda")


def test_64_experts(generator):
    assert not check(make_inputs(UNEVEN * 4, 1856, 1024, BF16, generator), "cuda")


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 7), (200, 72), (129, 257)])
def test_odd_sizes_and_a_total_that_is_not_aligned(n, k, offset, generator):
    assert not check(make_inputs(UNEVEN, n, k, BF16, generator, offset), "cuda")


def test_calls_add_up(generator):
    inputs = make_inputs([300], 1856, 1024, BF16, generator)
    total, dy, x, _ = inputs
    assert not problems_of_expert(run(inputs, "cuda", calls=2)[0], total[0], dy[:300].repeat(2, 1), x[:300].repeat(2, 1))


def test_ends_are_read_on_the_device_alone(generator):
    """A captured launch follows ends that change later."""
    total, dy, x, ends = make_inputs([100, 200], 264, 136, BF16, generator)
    found = total.clone()
    add_gradients(found, dy, x, ends)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_gradients(found, dy, x, ends)
    found.copy_(total)
    ends[0] = 250
    graph.replay()
    for expert, rows in enumerate((slice(0, 250), slice(250, 300))):
        assert not problems_of_expert(found[expert], total[expert], dy[rows], x[rows])


def test_more_totals_than_32_bits_count(generator):
    n, k, sizes = 1856, 1024, [100] + [0] * 1129 + [70]
    total = torch.full((len(sizes), n, k), torch.nan, device="cuda")
    total[[0, -1]] = torch.randn(2, n, k, generator=generator, device="cuda")
    dy, x = (torch.randn(sum(sizes), width, generator=generator, device="cuda").to(BF16) for width in (n, k))
    before = total[[0, -1]]
    add_gradients(total, dy, x, torch.tensor(list(accumulate(sizes)), dtype=torch.int32, device="cuda"))
    assert total.numel() > 2**31 and total[1:-1].isnan().all()
    assert not problems_of_expert(total[0], before[0], dy[:100], x[:100])
    assert not problems_of_expert(total[-1], before[1], dy[100:], x[100:])


def test_more_inputs_than_32_bits_count(generator):
    """The truth of the last groups alone."""
    n, k, sizes = 1032, 1040, [2**21, 70, 1000]
    dy, x = (torch.empty(sum(sizes), width, dtype=BF16, device="cuda").normal_(generator=generator) for width in (n, k))
    total = torch.randn(3, n, k, generator=generator, device="cuda")
    before = total.clone()
    add_gradients(total, dy, x, torch.tensor(list(accumulate(sizes)), dtype=torch.int32, device="cuda"))
    assert min(2**21 * n, 2**21 * k) > 2**31
    for expert, rows in ((1, slice(2**21, 2**21 + 70)), (2, slice(2**21 + 70, None))):
        assert not problems_of_expert(total[expert], before[expert], dy[rows], x[rows])
