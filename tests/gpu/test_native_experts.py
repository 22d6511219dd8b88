"""The experts of a rank together by Transformer Engine's kernels, on the GPU they need: against Transformer Engine's own modules and fp64.

Shapes: x_TK tokens sorted by expert, weight [E * N, K], y_TN.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from torchrun import launch

from megatron_ext.precision.executors import NativeGroupedExecutor
from megatron_ext.precision.state import PrecisionState
from megatron_ext.precision.te_recipes import autocast, te_recipe, unavailable
from ngpt.precision import QuantizerSpec
from ngpt.recipes import BLOCK, Recipe

pytestmark = pytest.mark.gpu

K, N = 256, 384
SIZES = [19, 0, 64, 1, 700, 0]
MANY = [size for size in (33, 0, 7) for _ in range(40)]
FP8 = Recipe("fp8", "bf16", "fp8")
STATIC, POW2 = QuantizerSpec(global_amax="static"), QuantizerSpec(global_amax="dynamic_pow2")
SQUARE, RHT = QuantizerSpec(block_shape=(BLOCK, BLOCK)), QuantizerSpec(rht="signed")
RECIPES = [
    FP8,
    dataclasses.replace(FP8, name="mxfp8", format="mxfp8"),
    Recipe("paper", "bf16", "nvfp4", STATIC, dataclasses.replace(STATIC, block_shape=(BLOCK, BLOCK)), POW2),
    Recipe("nvidia", "bf16", "nvfp4", RHT, SQUARE, RHT),
]
FARTHEST = {"fp8": 0.1, "mxfp8": 0.1, "nvfp4": 0.3}  # from the exact products; in BF16 they would be within 0.004
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


@dataclasses.dataclass
class Inputs:
    x: Tensor
    weight: torch.nn.Parameter
    dy: Tensor
    sizes: list[int]

    @property
    def own(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Tokens, matrix and grad_output of each expert."""
        tensors = self.x.detach().split(self.sizes), self.weight.detach().chunk(len(self.sizes)), self.dy.split(self.sizes)
        return list(zip(*tensors, strict=True))


def make_inputs(sizes: list[int] = SIZES, main_grad: bool = True) -> Inputs:
    """Rows of unit norm, and gradients whose size differs from expert to expert."""
    generator = torch.Generator().manual_seed(3)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    x, weight = (torch.nn.functional.normalize(normal(rows, K), dim=-1) for rows in (sum(sizes), len(sizes) * N))
    factors = torch.tensor([2.0 ** (expert % 7) for expert in range(len(sizes))]).repeat_interleave(torch.tensor(sizes))
    dy = normal(sum(sizes), N) * factors[:, None] * 1e-4
    inputs = Inputs(x.bfloat16().cuda().requires_grad_(), torch.nn.Parameter(weight.bfloat16().cuda()), dy.bfloat16().cuda(), sizes)
    if main_grad:
        inputs.weight.main_grad, inputs.weight.grad_added_to_main_grad = torch.zeros(weight.shape, device="cuda"), False
    return inputs


def make_executor(recipe: Recipe, keeps: bool = False) -> NativeGroupedExecutor:
    if reason := unavailable(recipe):
        pytest.skip(reason)
    return NativeGroupedExecutor(PrecisionState(1, 0, 4, keeps_weights=keeps), te_recipe(recipe))


def multiply(executor: NativeGroupedExecutor, inputs: Inputs) -> Tensor:
    return executor(SimpleNamespace(weight=inputs.weight), inputs.x, inputs.sizes)[0]


def run(recipe: Recipe, inputs: Inputs) -> list[Tensor]:
    """y, dx and what is added to the gradient of the weight."""
    y = multiply(make_executor(recipe), inputs)
    y.backward(inputs.dy)
    return [y.detach(), inputs.x.grad, getattr(inputs.weight, "main_grad", inputs.weight.grad)]


def filled_up(x: Tensor) -> Tensor:
    return pad(x, (0, 0, 0, -x.size(0) % 32))


def run_alone(recipe: Recipe, inputs: Inputs) -> list[Tensor]:
    """The same by a `Linear` of Transformer Engine for each expert with tokens."""
    import transformer_engine.pytorch as te

    made, found = te_recipe(recipe), []
    for x, weight, dy in inputs.own:
        main_grad = torch.zeros(N, K, device="cuda")
        if not len(x):
            found.append((x.new_empty(0, N), x, main_grad))
            continue
        linear = te.Linear(K, N, bias=False, params_dtype=torch.bfloat16, fuse_wgrad_accumulation=True, device="cuda")
        linear.weight.data.copy_(weight)
        linear.weight.main_grad = main_grad
        x_TK = filled_up(x).requires_grad_()
        with autocast(made):
            y = linear(x_TK)
        y.backward(filled_up(dy))
        found.append((y.detach()[: len(x)], x_TK.grad[: len(x)], main_grad))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def run_module(recipe: Recipe, inputs: Inputs) -> list[Tensor]:
    """The same by Transformer Engine's module for all experts, which has a parameter for each."""
    import transformer_engine.pytorch as te

    made, experts = te_recipe(recipe), len(inputs.sizes)
    module = te.GroupedLinear(experts, K, N, bias=False, params_dtype=torch.bfloat16, fuse_wgrad_accumulation=True, device="cuda")
    totals = torch.zeros(experts, N, K, device="cuda")
    for expert, (_, weight, _) in enumerate(inputs.own):
        param = getattr(module, f"weight{expert}")
        param.data.copy_(weight)
        param.main_grad = totals[expert]
    x_TK = torch.cat([filled_up(x) for x, _, _ in inputs.own]).requires_grad_()
    sizes = [-(-size // 32) * 32 for size in inputs.sizes]
    with autocast(made):
        y = module(x_TK, torch.tensor(sizes))
    y.backward(torch.cat([filled_up(dy) for _, _, dy in inputs.own]))
    filled = [torch.cat([part[:size] for part, size in zip(of_all.split(sizes), inputs.sizes, strict=True)]) for of_all in (y, x_TK.grad)]
    return [filled[0].detach(), filled[1], totals.flatten(0, 1)]


def relative_error(ours: Tensor, wanted: Tensor) -> float:
    return ((ours.double() - wanted.double()).norm() / wanted.double().norm()).item()


@each_recipe
@pytest.mark.parametrize("sizes", [SIZES, [0, 0, 96], [5000, 1, 0, 0, 3], MANY], ids=["uneven", "whole", "large", "120"])
def test_the_three_products_are_near_the_exact_ones_and_not_bf16(recipe, sizes):
    inputs = make_inputs(sizes)
    found = run(recipe, inputs)
    own = [[tensor.double() for tensor in tensors] for tensors in inputs.own]
    wanted = [torch.cat(parts) for parts in zip(*((x @ w.t(), dy @ w, dy.t() @ x) for x, w, dy in own), strict=True)]
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.shape == exact.shape and 5e-3 < relative_error(ours, exact) < FARTHEST[recipe.format]
    unused = torch.tensor([not size for size in sizes], device="cuda").repeat_interleave(N)
    assert inputs.weight.grad_added_to_main_grad and not found[2][unused].any()


@each_recipe
@pytest.mark.parametrize("sizes", [SIZES, MANY], ids=["uneven", "120"])
def test_experts_together_have_the_products_of_each_alone(recipe, sizes):
    """Operands are the same; sums may come in another order, which fp8 products of the forward pass on Hopper keep with 14 bits."""
    ours, alone = run(recipe, make_inputs(sizes)), run_alone(recipe, make_inputs(sizes))
    for name, found, wanted in zip(("y", "dx", "dw"), ours, alone, strict=True):
        print(f"{recipe.name} {name}: {relative_error(found, wanted):.1e}, same bits: {torch.equal(found, wanted)}")
        assert found.dtype == wanted.dtype and relative_error(found, wanted) < 2.0**-8


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("sizes", [SIZES, MANY], ids=["uneven", "120"])
def test_transformer_engines_module_for_all_experts_gives_the_same_bits(recipe, sizes):
    ours, theirs = run(recipe, make_inputs(sizes)), run_module(recipe, make_inputs(sizes))
    assert all(torch.equal(found, wanted) for found, wanted in zip(ours, theirs, strict=True))


@each_recipe
def test_main_grad_accumulates_over_microbatches_and_weights_kept_through_a_step_change_no_bit(recipe):
    once, totals = run(recipe, make_inputs())[2], []
    for keeps in (False, True):
        executor, inputs = make_executor(recipe, keeps), make_inputs()
        for _ in range(2):
            with executor.state.weights.training_step():
                for _ in range(2):
                    multiply(executor, inputs).backward(inputs.dy)
            total = inputs.weight.main_grad.clone()
            inputs.weight.main_grad.zero_()
            with torch.no_grad():
                inputs.weight.copy_(-inputs.weight)  # dw is that of before, and y is not
        totals.append((total, multiply(executor, inputs).detach()))
    assert torch.equal(totals[0][0], 2 * once)
    assert all(torch.equal(*pair) for pair in zip(*totals, strict=True))
    assert torch.equal(totals[0][1], run(recipe, make_inputs())[0])  # the sign changed twice


@each_recipe
@pytest.mark.parametrize("keeps", [False, True])
def test_a_step_multiplies_with_its_own_weights(recipe, keeps):
    executor, inputs, outputs = make_executor(recipe, keeps), make_inputs(), []
    for _ in range(2):
        with executor.state.weights.training_step():
            outputs.append([multiply(executor, inputs).detach() for _ in range(2)])
        with torch.no_grad():
            inputs.weight.copy_(-inputs.weight)
    assert torch.equal(outputs[0][0], outputs[0][1]) and torch.equal(outputs[1][0], outputs[1][1])
    assert relative_error(outputs[1][0], -outputs[0][0]) < 2.0**-8


@each_recipe
@pytest.mark.parametrize("keeps", [False, True])
def test_recompute_changes_nothing(recipe, keeps):
    results = []
    for recomputes in (False, True):
        executor, inputs = make_executor(recipe, keeps), make_inputs()

        def forward(x: Tensor, executor=executor, inputs=inputs) -> Tensor:
            return multiply(executor, dataclasses.replace(inputs, x=x))

        with executor.state.weights.training_step():
            y = checkpoint(forward, inputs.x, use_reentrant=True) if recomputes else forward(inputs.x)
            y.backward(inputs.dy)
        results.append((y.detach(), inputs.x.grad, inputs.weight.main_grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@each_recipe
def test_without_a_gradient_buffer_the_gradient_is_returned(recipe):
    returned, added = run(recipe, make_inputs(main_grad=False))[2], run(recipe, make_inputs())[2]
    assert returned.dtype == torch.bfloat16 and relative_error(returned, added) < 2.0**-8


@each_recipe
def test_without_gradients_the_output_is_the_same_and_nothing_is_kept(recipe):
    inputs = make_inputs()
    with torch.no_grad():
        y = multiply(make_executor(recipe), inputs)
    assert torch.equal(y, run(recipe, inputs)[0])


@each_recipe
def test_an_infinite_gradient_stays_with_its_expert(recipe):
    inputs = make_inputs()
    inputs.dy[30, 3] = float("inf")  # of the third expert
    _, dx, dw = run(recipe, inputs)
    for parts in (dx.split(SIZES), dw.chunk(len(SIZES))):
        others = [part for expert, part in enumerate(parts) if expert != 2]
        assert all(part.isfinite().all() for part in others)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict]:
    if not torch.cuda.is_available() or (reason := unavailable(FP8)):
        pytest.skip(reason if torch.cuda.is_available() else "needs a CUDA device")
    out = tmp_path_factory.mktemp("probe") / "found.json"
    launch(Path(__file__).with_name("native_experts_probe.py"), [str(out)], processes=1)
    return json.loads(out.read_text())


@pytest.mark.parametrize("spec", ["plain", "gated", "recomputed", "control"])
def test_a_model_trains_as_with_experts_one_by_one(models, spec):
    """Loss and all gradients, of which the experts' are stacked; some expert has no token."""
    found = models[spec]
    assert found["executors"] == [["NativeExecutor"], ["NativeExecutor", "NativeGroupedExecutor"]]
    assert found["empty"] > 0 and len(found["differences"]) > 15
    print(spec, {name: f"{value:.1e}" for name, value in found["differences"].items()})
    assert found["differences"].pop("loss") < 1e-3
    assert max(found["differences"].values()) < 0.05  # an fp8 product itself is 0.04 to 0.06 away


@pytest.mark.parametrize("spec", ["plain", "gated", "recomputed", "control"])
def test_checkpoints_hold_the_same_entries_either_way(models, spec):
    sequential, grouped = models[spec]["checkpoints"]
    assert sequential == grouped and any("experts" in entry for entry in grouped)
