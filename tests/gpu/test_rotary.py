"""Queries, keys and values from mixed heads on a GPU, at the heads of the models, against fp64 and against what Transformer Engine does."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "kernels"))
from rotary_cases import FACTOR, Case, check, make_inputs, ours, strided, truth, with_heads_of_size  # noqa: E402
from row_cases import ROWS, error  # noqa: E402

from ngpt.functional import l2_normalize, split_heads  # noqa: E402

pytestmark = pytest.mark.gpu
BF16, FP32 = torch.bfloat16, torch.float32
# 1.2B dense, the hybrid's attention, one group a rank, odd numbers of heads, other widths, part of a head, one token.
CASES = [
    Case(16, 4, 128, 128, sequence=1000),
    Case(32, 2, 128, 0, sequence=513, batch=1),
    Case(16, 1, 128, 128, sequence=77),
    Case(15, 5, 64, 64, sequence=301, batch=3),
    Case(7, 7, 256, 256, sequence=65),
    Case(4, 2, 96, 96, sequence=130),
    Case(8, 2, 128, 64, sequence=99),
    Case(4, 2, 100, 20, sequence=50, batch=1),
    Case(2, 1, 33, 0, sequence=40),
    Case(16, 4, 128, 128, sequence=1, batch=1),
]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("is_scaled", [True, False], ids=["ngpt", "control"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, is_scaled, dtype, generator):
    assert not check(make_inputs(replace(case, is_scaled=is_scaled), dtype, generator))


@pytest.mark.parametrize("kind", ROWS)
def test_heads_of_any_size(kind, generator):
    for dtype in (BF16, FP32):
        assert not check(with_heads_of_size(make_inputs(Case(16, 4, 128, 128, sequence=50), dtype, generator), ROWS[kind]))


@pytest.mark.parametrize("is_scaled", [True, False], ids=["ngpt", "control"])
def test_gradients_with_strides_and_heads_within_wider_rows(is_scaled, generator):
    inputs = make_inputs(Case(16, 4, 128, 128, is_scaled, sequence=70), BF16, generator)
    for number, other in enumerate(strided(inputs)):
        assert not check(other), number
    wide = torch.cat((inputs.mixed, inputs.mixed), -1)
    assert not check(replace(inputs, mixed=wide[..., inputs.mixed.size(-1) :]))


def test_two_runs_give_the_same_bits(generator):
    inputs = make_inputs(Case(16, 4, 128, 128, sequence=4096), BF16, generator)
    assert all(torch.equal(a, b) for a, b in zip(ours(inputs), ours(inputs), strict=True))


@pytest.mark.parametrize("is_scaled", [True, False], ids=["ngpt", "control"])
def test_more_numbers_than_32_bits_count(is_scaled, generator):
    """360,000 tokens of 48 heads of 128; the truth of the last positions alone, whose offsets are the largest."""
    inputs = make_inputs(Case(32, 8, 128, 128, is_scaled, sequence=180_000), BF16, generator)
    assert inputs.mixed.numel() > 2**31
    last = slice(-300, None)
    part = replace(inputs, mixed=inputs.mixed[last], angles=inputs.angles[last], grads=tuple(grad[last] for grad in inputs.grads))
    actual, alone = ours(inputs), ours(part)
    for name, a, b, t in zip("qkvg", actual, alone, truth(part), strict=False):
        assert torch.equal(a[last], b) and error(b, t) < 0.01, name


def separate(inputs, rotate) -> list[torch.Tensor]:
    """What ran before: split, rotate, normalise, each on its own."""
    mixed, scale = inputs.mixed.detach().requires_grad_(), inputs.scale.detach().requires_grad_()
    heads, groups = inputs.heads, inputs.groups
    each, width = heads // groups, mixed.size(-1) // (heads + 2 * groups)
    q, k, v = mixed.unflatten(-1, (groups, -1)).split((each * width, width, width), -1)
    q, k = rotate(q.reshape(*q.shape[:2], heads, width), inputs.angles), rotate(k, inputs.angles)
    scaled = l2_normalize(q.float()) * (scale.view(heads, width) * FACTOR) ** 2
    out = scaled.to(q.dtype), l2_normalize(k), v
    return [*(x.detach() for x in out), *torch.autograd.grad(out, (mixed, scale), inputs.grads)]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_no_further_from_the_truth_than_transformer_engine_and_separate_norms(dtype, generator):
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    inputs = make_inputs(Case(16, 4, 128, 128, sequence=512), dtype, generator)
    before = separate(inputs, lambda x, angles: apply_rotary_pos_emb(x.contiguous(), angles, tensor_format="sbhd", fused=True))
    for a, b, t in zip(ours(inputs), before, truth(inputs), strict=True):
        assert error(a, t) <= 1.1 * error(b, t) + 1e-5


def test_a_cuda_graph_repeats_it(generator):
    """Nothing waits for the host, and no number of the first run is kept."""
    inputs = make_inputs(Case(16, 4, 128, 128, sequence=256), BF16, generator)
    mixed = inputs.mixed.clone()

    def run() -> tuple[torch.Tensor, ...]:
        return split_heads(mixed, 16, 4, inputs.angles, inputs.scale, FACTOR)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    mixed.copy_(inputs.mixed.flip(0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
