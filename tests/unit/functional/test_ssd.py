"""The chunked scan against the recurrence itself in fp64, forward and backward.

The bound for a value or gradient in fp32 or bf16 is twice the error that the recurrence makes in the same dtype, plus 1e-5, both relative
to the largest fp64 entry.
"""

import pytest
import torch
import torch.nn.functional as F
from reference_mamba import recurrence
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ngpt.functional.ssd import ssd_scan

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_states")
PER_TOKEN = ("x", "dt", "B", "C")
LAYOUTS = {"one_group": (4, 1), "groups_of_heads": (6, 2), "group_a_head": (3, 3)}  # heads, groups
LENGTHS = [(1, 4), (3, 4), (4, 4), (5, 4), (16, 4), (23, 8), (9, 64), (7, 1)]  # sequence, chunk
FP64 = 1e-12
BF16_ROUNDING = 2**-8  # of a correctly rounded value, relative


def make_inputs(length=13, heads=4, groups=2, batch=2, head_dim=3, state=5, dtype=torch.float64, fast_decay=False) -> dict[str, Tensor]:
    """Steps and rates as in a trained model; with `fast_decay` some tokens wipe the state out and others hardly touch it."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    dt = F.softplus(3 * normal(batch, length, heads) + 1 if fast_decay else normal(batch, length, heads) - 2)
    rate = 1 + 15 * torch.rand(heads, dtype=torch.float64, generator=generator)
    x, B, C = normal(batch, length, heads, head_dim), normal(batch, length, groups, state), normal(batch, length, groups, state)
    values = (x, dt, -rate, B, C, normal(heads), normal(batch, heads, head_dim, state))
    return {name: value.to(dtype) for name, value in zip(NAMES, values, strict=True)}


def chunked(chunk: int, seq_idx: Tensor | None = None):
    return lambda x, dt, A, B, C, D, initial_states: ssd_scan(x, dt, A, B, C, chunk, D, initial_states, seq_idx)


def results(function, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of a random weighting of both of them; the weights are the same in every dtype."""
    generator = torch.Generator().manual_seed(9)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y, final = function(*leaves.values())
    weights = (torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in (y, final))
    loss = sum((weight * out).sum() for weight, out in zip(weights, (y, final), strict=True))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y.detach(), "final": final.detach()} | dict(zip(leaves, gradients, strict=True))


def error(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-300)).item()


def assert_equal_results(actual: dict[str, Tensor], truth: dict[str, Tensor], bound: float = FP64) -> None:
    errors = {name: error(actual[name], truth[name]) for name in truth}
    assert max(errors.values()) < bound, errors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length, chunk", LENGTHS)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(length, chunk, layout):
    heads, groups = LAYOUTS[layout]
    inputs = make_inputs(length, heads, groups)
    assert_equal_results(results(chunked(chunk), inputs), results(recurrence, inputs))


def test_gradients_agree_with_finite_differences():
    inputs = make_inputs(length=5, heads=2, groups=1, batch=1, head_dim=2, state=2)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1]])
    leaves = [value.requires_grad_() for value in inputs.values()]
    for documents in (None, seq_idx):
        assert torch.autograd.gradcheck(chunked(2, documents), leaves)


@pytest.mark.parametrize("fast_decay", [False, True], ids=["ordinary", "fast_decay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_as_near_to_fp64_as_the_recurrence(dtype, fast_decay):
    """With fast decay this fails where exponents are summed, or their gradients are, in fp32."""
    inputs = make_inputs(length=150, head_dim=8, state=8, dtype=dtype, fast_decay=fast_decay)
    truth = results(recurrence, {name: value.double() for name, value in inputs.items()})
    eager, actual = results(recurrence, inputs), results(chunked(128), inputs)
    for name in truth:
        assert error(actual[name], truth[name]) <= 2 * error(eager[name], truth[name]) + 1e-5, name
    assert all(actual[name].dtype == dtype for name in ("y", *NAMES)) and actual["final"].dtype == torch.float32


def test_bf16_outputs_and_gradients_are_the_fp64_values_rounded_once():
    inputs = make_inputs(length=70, dtype=torch.bfloat16)
    actual = results(chunked(32), inputs)
    for name, truth in results(recurrence, {name: value.double() for name, value in inputs.items()}).items():
        assert ((actual[name].double() - truth).abs() <= truth.abs() * BF16_ROUNDING * 1.001 + 1e-6 * truth.abs().max()).all(), name


@pytest.mark.parametrize("chunk", [1, 2, 7, 12, 13, 14, 1000])
def test_chunk_size_and_the_padding_it_needs_change_nothing(chunk):
    inputs = make_inputs(length=13)
    assert_equal_results(results(chunked(chunk), inputs), results(chunked(5), inputs))


def test_later_tokens_reach_no_earlier_output_and_no_earlier_gradient():
    inputs = make_inputs(length=13)
    cut = 6
    changed = {name: value.clone() for name, value in inputs.items()}
    for name in PER_TOKEN:
        changed[name][:, cut:] *= 3
    before, after = (chunked(4)(*values.values())[0] for values in (inputs, changed))
    assert torch.equal(before[:, :cut], after[:, :cut]) and not torch.equal(before[:, cut:], after[:, cut:])
    leaves = [value.requires_grad_() for value in inputs.values()]
    gradients = dict(zip(inputs, torch.autograd.grad(chunked(4)(*leaves)[0][:, :cut].sum(), leaves), strict=True))
    assert all(gradients[name][:, cut:].eq(0).all() and gradients[name][:, :cut].ne(0).any() for name in PER_TOKEN)


@pytest.mark.parametrize("cut", [1, 4, 6, 12])
def test_a_sequence_cut_in_two_with_the_state_carried_over_is_the_whole_sequence(cut):
    def in_two_parts(x, dt, A, B, C, D, initial_states):
        first, state = ssd_scan(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], 4, D, initial_states)
        second, state = ssd_scan(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], 4, D, state)
        return torch.cat([first, second], dim=1), state

    inputs = make_inputs(length=13)
    assert_equal_results(results(in_two_parts, inputs), results(chunked(4), inputs))


DOCUMENTS = {
    "inside_chunks": [[0] * 3 + [1] * 7 + [2] * 4, [0] * 6 + [1] * 2 + [2] * 6],
    "at_chunk_edges": [[0] * 4 + [1] * 8 + [2] * 2, [5] * 8 + [6] * 4 + [7] * 2],
    "one_token_each": [list(range(14)), [0] * 13 + [1]],
    "longer_than_chunks": [[3] * 14, [0] + [1] * 13],
}


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_documents_start_from_nothing(documents):
    seq_idx = torch.tensor(DOCUMENTS[documents], dtype=torch.int32)
    inputs = make_inputs(length=14)
    assert_equal_results(results(chunked(4, seq_idx), inputs), results(lambda *values: recurrence(*values, seq_idx), inputs))


def test_a_document_among_others_is_the_document_alone():
    inputs = make_inputs(length=14)
    y, final = chunked(4, torch.tensor([[0] * 6 + [1] * 8] * 2))(*inputs.values())
    alone = {name: value[:, 6:] if name in PER_TOKEN else value for name, value in inputs.items()}
    alone["initial_states"] = torch.zeros_like(inputs["initial_states"])
    for actual, truth in zip((y[:, 6:], final), chunked(4)(*alone.values()), strict=True):
        assert error(actual, truth) < FP64


def test_a_missing_initial_state_and_a_missing_skip_are_zero():
    inputs = make_inputs()
    x, dt, A, B, C, D, initial_states = inputs.values()
    truths = recurrence(x, dt, A, B, C, torch.zeros_like(D), torch.zeros_like(initial_states))
    for actual, truth in zip(ssd_scan(x, dt, A, B, C, 4), truths, strict=True):
        assert error(actual, truth) < FP64


def test_the_skip_may_have_a_weight_for_each_feature():
    inputs = make_inputs()
    inputs["D"] = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_equal_results(results(chunked(4), inputs), results(recurrence, inputs))


def test_work_and_kept_memory_grow_linearly_with_the_sequence():
    def cost(length: int) -> tuple[int, int]:
        leaves = [value.requires_grad_() for value in make_inputs(length, dtype=torch.float32).values()]
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y, _ = chunked(16)(*leaves)
            y.sum().backward()
        return counter.get_total_flops(), sum(kept.values())

    (flops, memory), (twice_flops, twice_memory) = cost(256), cost(512)
    assert twice_flops == 2 * flops > 0
    assert 1.9 < twice_memory / memory <= 2
