"""Native experts of a rank together, where Transformer Engine is missing: which of its calls get what, against a stand-in for them.

The stand-in keeps what matters of Transformer Engine 2.20.2: parts are quantised each by its own amax, here to 17 values; a product reads
the direction that cuBLAS would, and takes no empty part and none that is not filled up. The real thing is tested in tests/gpu.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ext.precision.executors import NativeGroupedExecutor, QuantizableGrouped
from megatron_ext.precision.state import PrecisionState
from megatron_ext.precision.weights import StepWeights

K, N, EXPERTS = 16, 48, 6
SIZES = [19, 0, 32, 1, 70, 0]
KINDS = ["Float8CurrentScalingQuantizer", "MXFP8Quantizer", "NVFP4Quantizer", "GivenAmaxQuantizer"]
MADE: list["Part"] = []  # by the present test


def coarse(x: Tensor) -> Tensor:
    """17 values up to the amax of what is quantised as one tensor: a part, and no less nor more."""
    scale = x.abs().max().clamp(min=1e-30) / 8
    return (x / scale).round() * scale


class Part:
    def __init__(self, x: Tensor, quantizer: "FakeQuantizer"):
        assert x.is_contiguous() and not x.requires_grad and quantizer.internal
        self.rowwise = coarse(x) if quantizer.rowwise else None
        self.columnwise = coarse(x) if quantizer.columnwise else None
        self.operand = quantizer.operand
        MADE.append(self)

    def update_usage(self, rowwise_usage: bool, columnwise_usage: bool) -> None:
        assert not columnwise_usage or self.columnwise is not None
        self.rowwise = self.rowwise if rowwise_usage else None


class FakeQuantizer:
    def __init__(self, operand: str):
        self.operand, self.internal, self.rowwise, self.columnwise = operand, False, True, True

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise, self.columnwise = rowwise, columnwise


CLASSES = {name: type(name, (FakeQuantizer,), {}) for name in KINDS}
CLASSES["GivenAmaxQuantizer"].quantize_parts = lambda self, x, sizes: [Part(part, self) for part in x.split(sizes)]


def split_quantize(x: Tensor, sizes: list[int], quantizers: list) -> list[Part]:
    assert all(type(quantizer).__name__ in KINDS[:2] for quantizer in quantizers)
    return [Part(part, quantizer) for part, quantizer in zip(x.split(sizes), quantizers, strict=True)]


def multi_tensor_quantize(parts: list[Tensor], quantizers: list) -> list[Part]:
    assert all(type(quantizer).__name__ == "NVFP4Quantizer" for quantizer in quantizers)
    return [Part(part, quantizer) for part, quantizer in zip(parts, quantizers, strict=True)]


def general_grouped_gemm(a, b, out, params, out_dtype, *, layout, m_splits, grad, accumulate, use_split_accumulator, single_output):
    assert len(a) == len(b) == len(params) == len(m_splits) and all(size and size % 32 == 0 for size in m_splits)
    assert grad is use_split_accumulator is (layout != "TN") and single_output is (layout != "NT") and out[0].dtype == out_dtype
    operands = {"TN": ("weight", "input"), "NN": ("weight", "grad_output"), "NT": ("input", "grad_output")}[layout]
    assert all((left.operand, right.operand) == operands for left, right in zip(a, b, strict=True))
    products = {
        "TN": lambda left, right: right.rowwise @ left.rowwise.t(),
        "NN": lambda left, right: right.rowwise @ left.columnwise,
        "NT": lambda left, right: right.columnwise.t() @ left.columnwise,
    }
    into = out[0].split(m_splits) if single_output else out
    for left, right, target in zip(a, b, into, strict=True):
        product = products[layout](left, right)
        assert product.shape == target.shape and target.is_contiguous()
        target.copy_(product + target if accumulate else product)


def recipe_state(recipe: str, *, mode: str, num_quantizers: int, roles: list) -> SimpleNamespace:
    assert num_quantizers == len(roles) and all(role.module_type == "grouped_linear" for role in roles)
    assert [role.tensor_type for role in roles] == {"forward": ["input", "weight"], "backward": ["grad_output"]}[mode]
    return SimpleNamespace(make_quantizers=lambda: [CLASSES[recipe](role.tensor_type) for role in roles])


@pytest.fixture(autouse=True)
def te_grouped(monkeypatch) -> ModuleType:
    """megatron_ext.precision.te_grouped over the stand-in."""
    calls = dict(split_quantize=split_quantize, multi_tensor_quantize=multi_tensor_quantize, general_grouped_gemm=general_grouped_gemm)
    contents = {
        "transformer_engine": {},
        "transformer_engine.pytorch": {"cpp_extensions": SimpleNamespace(**calls)},
        "transformer_engine.pytorch.quantization": {
            "QuantizerRole": SimpleNamespace,
            "RecipeState": SimpleNamespace(create=recipe_state),
        },
        "transformer_engine.pytorch.tensor": {},
        "transformer_engine.pytorch.tensor.float8_tensor": {KINDS[0]: CLASSES[KINDS[0]]},
        "transformer_engine.pytorch.tensor.mxfp8_tensor": {KINDS[1]: CLASSES[KINDS[1]]},
        "transformer_engine.pytorch.tensor.nvfp4_tensor": {KINDS[2]: CLASSES[KINDS[2]]},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    name = "megatron_ext.precision.te_grouped"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("megatron_ext.precision.te_grouped", raising=False)
    module = importlib.import_module(name)
    MADE.clear()
    yield module
    del sys.modules[name]


def operands(sizes=SIZES, main_grad: bool = True, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the stacked weight and grad_output, each expert's of another size, so that amaxes differ."""
    generator = torch.Generator().manual_seed(11)
    of_tokens, of_experts = torch.ones(sum(sizes), 1), torch.arange(1.0, len(sizes) + 1).repeat_interleave(N)[:, None]
    for expert, rows in enumerate(of_tokens.split(sizes)):
        rows.fill_(3.0**expert)
    x = (torch.randn(sum(sizes), K, generator=generator) * of_tokens).to(dtype).requires_grad_()
    weight = torch.nn.Parameter((torch.randn(len(sizes) * N, K, generator=generator) * of_experts).to(dtype))
    if main_grad:
        weight.main_grad, weight.grad_added_to_main_grad = torch.randn(weight.shape, generator=generator), False
    return x, weight, torch.randn(sum(sizes), N, generator=generator).to(dtype)


class Backend(torch.nn.Module):
    def __init__(self, experts: int, weight: Tensor, pg_collection: object):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, sizes: list[int]) -> tuple[Tensor, None]:
        return x.new_full((x.size(0), N), 7.0), None


class Linear(QuantizableGrouped, Backend):
    pass


def linear_of(weight: Tensor, kind: str = KINDS[0], keeps: bool = False) -> Linear:
    linear = Linear(EXPERTS, weight, pg_collection=SimpleNamespace(expt_tp=None))
    linear.executor = NativeGroupedExecutor(PrecisionState(1, 0, 4, keeps_weights=keeps), kind)
    return linear


def of_experts_alone(x: Tensor, weight: Tensor, dy: Tensor, sizes=SIZES) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dw of each expert by itself. Zeros that fill up tokens change none of it."""
    parts = zip(x.detach().split(sizes), weight.detach().chunk(len(sizes)), dy.split(sizes), strict=True)
    own = [tuple(coarse(part) if part.numel() else part for part in of_one) for of_one in parts]
    return tuple(torch.cat(results) for results in zip(*((a @ w.t(), g @ w, g.t() @ a) for a, w, g in own), strict=True))


def assert_close(found: Tensor, wanted: Tensor, dtype=torch.float64) -> None:
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert (found.double() - wanted.double()).abs().max() <= bound * wanted.abs().max()


@pytest.mark.parametrize("main_grad", [False, True], ids=["grad", "main_grad"])
@pytest.mark.parametrize("sizes", [SIZES, [0, 0, 64, 0, 32, 32], [0, 0, 0, 0, 0, 1]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_gets_what_it_alone_would_get(kind, sizes, main_grad):
    x, weight, dy = operands(sizes, main_grad)
    before = weight.main_grad.clone() if main_grad else 0
    y, bias = linear_of(weight, kind)(x, sizes)
    y.backward(dy)
    wanted_y, wanted_dx, wanted_dw = of_experts_alone(x, weight, dy, sizes)
    assert bias is None
    assert_close(y, wanted_y)
    assert_close(x.grad, wanted_dx)
    assert_close(weight.main_grad if main_grad else weight.grad, wanted_dw + before, torch.float32 if main_grad else torch.float64)
    if main_grad:
        unused = torch.tensor([not size for size in sizes]).repeat_interleave(N)
        assert weight.grad_added_to_main_grad and torch.equal(weight.main_grad[unused], before[unused])


def test_micro_batches_add_up_in_main_grad():
    x, weight, dy = operands()
    before, linear = weight.main_grad.clone(), linear_of(weight)
    for factor in (1, 4):
        linear(x, SIZES)[0].backward(factor * dy)
    assert_close(weight.main_grad, before + 5 * of_experts_alone(x, weight, dy)[2], torch.float32)


@pytest.mark.parametrize("keeps", [False, True])
def test_weights_are_quantised_once_a_step_where_they_are_kept_and_anew_in_the_next(keeps):
    x, weight, dy = operands()
    linear = linear_of(weight, keeps=keeps)
    for _ in range(2):
        MADE.clear()
        with linear.executor.state.weights.training_step():
            for _ in range(3):
                y, _ = linear(x, SIZES)
                y.backward(dy)
        assert sum(part.operand == "weight" for part in MADE) == EXPERTS * (1 if keeps else 3)
        assert_close(y, of_experts_alone(x, weight, dy)[0])
        with torch.no_grad():
            weight.mul_(1.7)


@pytest.mark.parametrize("keeps", [False, True])
def test_recomputing_changes_nothing(keeps):
    results = []
    for recomputes in (False, True):
        x, weight, dy = operands()
        linear = linear_of(weight, keeps=keeps)

        def forward(x: Tensor, linear=linear) -> Tensor:
            return linear(x, SIZES)[0]

        with linear.executor.state.weights.training_step():
            y = checkpoint(forward, x, use_reentrant=True) if recomputes else forward(x)
            y.backward(dy)
        results.append((y.detach(), x.grad, weight.main_grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_only_what_a_backward_pass_reads_is_made_and_kept():
    x, weight, dy = operands()
    linear = linear_of(weight)
    with torch.no_grad():
        linear(x, SIZES)
    assert MADE and not any(part.columnwise is not None for part in MADE)
    MADE.clear()
    y, _ = linear(x, SIZES)
    assert all(part.columnwise is not None and (part.rowwise is None) == (part.operand == "input") for part in MADE)
    node = y.grad_fn
    y.backward(dy)
    assert node.held is None


def test_a_frozen_weight_gets_no_gradient_and_the_input_does():
    x, weight, dy = operands(main_grad=False)
    weight.requires_grad_(False)
    linear_of(weight)(x, SIZES)[0].backward(dy)
    assert weight.grad is None
    assert_close(x.grad, of_experts_alone(x, weight, dy)[1])
    assert all((part.columnwise is None) == (part.operand != "weight") for part in MADE)


def test_a_gradient_of_the_weight_alone():
    x, weight, dy = operands(main_grad=False)
    linear_of(weight)(x.detach(), SIZES)[0].backward(dy)
    assert_close(weight.grad, of_experts_alone(x, weight, dy)[2])


def test_without_any_token_and_in_the_tail_experts_run_in_the_backend():
    x, weight, _ = operands()
    linear = linear_of(weight)
    assert linear(x[:0], [0] * EXPERTS)[0].shape == (0, N)
    linear.executor.state.begin_step(5)  # behind the last step in low precision
    assert torch.equal(linear(x, SIZES)[0], torch.full((sum(SIZES), N), 7.0, dtype=x.dtype))
    assert not MADE


def test_kept_operands_of_any_kind_are_dropped_at_the_end_of_a_step():
    weights, weight = StepWeights(keeps=True), torch.nn.Parameter(torch.ones(2))
    assert weights.kept(weight, list) is None
    with weights.training_step():
        first = weights.kept(weight, list)
        assert weights.kept(weight, list) is first
    with weights.training_step():
        assert weights.kept(weight, list) is not first
