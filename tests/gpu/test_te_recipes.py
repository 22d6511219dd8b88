"""The recipes that Transformer Engine computes, on the GPU they need; elsewhere skipped with Transformer Engine's own reason.

Shapes: x_MK, weight [N, K], y_MN.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ext.precision.te_recipes import autocast, prepare, te_recipe, unavailable
from ngpt.precision import QuantizedTensor, QuantizerSpec, qgemm, quantize
from ngpt.precision.check_golden import gemm_within_bound
from ngpt.precision.tensor import equal_codes, equal_scales, equal_values
from ngpt.recipes import BLOCK, Direction, Recipe

pytestmark = pytest.mark.gpu

M, K, N = 256, 512, 384
FP8 = Recipe("fp8", "bf16", "fp8")
MXFP8 = dataclasses.replace(FP8, name="mxfp8", format="mxfp8")
DYNAMIC, STATIC, POW2 = (QuantizerSpec(global_amax=amax) for amax in ("dynamic", "static", "dynamic_pow2"))
SQUARE = {"block_shape": (BLOCK, BLOCK)}
PAPER = Recipe("paper", "bf16", "nvfp4", STATIC, dataclasses.replace(STATIC, **SQUARE), POW2)
NVIDIA = dataclasses.replace(PAPER, name="nvidia", input=DYNAMIC, weight=dataclasses.replace(DYNAMIC, **SQUARE), grad_output=DYNAMIC)
RHT = dataclasses.replace(DYNAMIC, rht="signed")
SR = dataclasses.replace(POW2, rounding="sr")


def need(recipe: Recipe) -> None:
    if reason := unavailable(recipe):
        pytest.skip(reason)


def normal(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).bfloat16().cuda()


def make_linear(recipe: Recipe, **options):
    """A linear of Transformer Engine over weights of unit norm."""
    need(recipe)
    import transformer_engine.pytorch as te

    linear = te.Linear(K, N, bias=False, params_dtype=torch.bfloat16, device="cuda", **options)
    with torch.no_grad():
        linear.weight.copy_(normal(N, K, seed=1, size=K**-0.5))
    return linear


def run(linear, recipe, x: Tensor, dy: Tensor, **options) -> tuple[Tensor, Tensor]:
    """y and dx; the weight's gradient is where the linear puts it."""
    x = x.clone().requires_grad_()
    with autocast(recipe):
        y = linear(x, **options)
    y.backward(dy)
    return y.detach(), x.grad


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("recipe", [FP8, MXFP8], ids=lambda recipe: recipe.name)
def test_an_eight_bit_linear_is_near_the_exact_products_and_not_bf16(recipe):
    linear, x, dy = make_linear(recipe), normal(M, K, seed=2), normal(M, N, seed=3, size=1e-5)
    y, dx = run(linear, te_recipe(recipe), x, dy)
    x, w, dy = x.double(), linear.weight.detach().double(), dy.double()
    for ours, exact in ((y, x @ w.t()), (dx, dy @ w), (linear.weight.grad, dy.t() @ x)):
        assert 5e-3 < relative_error(ours, exact) < 0.1


def test_main_grad_accumulates_over_microbatches():
    linear, x, dy = make_linear(FP8, fuse_wgrad_accumulation=True), normal(M, K, seed=2), normal(M, N, seed=3, size=1e-5)
    linear.weight.main_grad = torch.zeros(N, K, device="cuda")
    recipe = te_recipe(FP8)
    run(linear, recipe, x, dy)
    once = linear.weight.main_grad.clone()
    run(linear, recipe, x, dy)
    assert relative_error(once, dy.double().t() @ x.double()) < 0.1
    assert torch.equal(linear.weight.main_grad, 2 * once)


def test_recompute_changes_nothing():
    """The second forward pass of a checkpoint enters the context again."""
    kept, recomputed = make_linear(FP8), make_linear(FP8)
    recipe, x, dy = te_recipe(FP8), normal(M, K, seed=2), normal(M, N, seed=3, size=1e-5)
    expected = run(kept, recipe, x, dy)

    def forward(x: Tensor) -> Tensor:
        with autocast(recipe):
            return recomputed(x)

    x = x.clone().requires_grad_()
    y = checkpoint(forward, x, use_reentrant=True)
    y.backward(dy)
    assert torch.equal(y, expected[0]) and torch.equal(x.grad, expected[1])
    assert torch.equal(recomputed.weight.grad, kept.weight.grad)


def test_the_context_nests_and_leaves_no_trace():
    linear, recipe, other = make_linear(FP8), te_recipe(FP8), te_recipe(FP8)
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    x = normal(M, K, seed=2)
    with torch.no_grad():
        plain = linear(x)
        with pytest.raises(ZeroDivisionError), autocast(recipe):
            with autocast(other):
                quantized = linear(x)
            assert FP8GlobalStateManager.get_fp8_recipe() is recipe
            raise ZeroDivisionError
        assert not FP8GlobalStateManager.is_fp8_enabled()
        assert torch.equal(linear(x), plain) and not torch.equal(quantized, plain)


def test_only_a_prepared_linear_follows_its_weight(tmp_path):
    """Megatron's own reset of the weight cache does nothing here: without `prepare` the first weight would serve for ever."""
    need(FP8)
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        config = TransformerConfig(num_layers=1, hidden_size=K, num_attention_heads=4, params_dtype=torch.bfloat16, bf16=True)
        recipe, x = te_recipe(FP8), normal(M, K, seed=2)
        for prepared in (True, False):
            model = MegatronModule(config=config)
            model.linear = TEColumnParallelLinear(
                K,
                N,
                config=config,
                init_method=torch.nn.init.normal_,
                gather_output=False,
                bias=False,
                skip_bias_add=False,
                is_expert=False,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
            )
            if prepared:
                prepare(model.linear)
            outputs = []
            for _ in range(2):
                model.set_is_first_microbatch()
                with torch.no_grad(), autocast(recipe):
                    outputs.append(model.linear(x)[0])
                    model.linear.weight.mul_(2)
            assert torch.equal(outputs[1], outputs[0] * (2 if prepared else 1))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def test_recipes_do_not_follow_the_environment():
    need(FP8)
    program = (
        "from tests.gpu.test_te_recipes import FP8, MXFP8, PAPER, te_recipe\n"
        "for recipe in (FP8, MXFP8, PAPER): made = te_recipe(recipe); print(repr(made), sorted(vars(made)))"
    )
    changed = {"NVTE_BACKWARD_OVERRIDE": "dequantized", "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES": "1"}
    printed = [
        subprocess.run([sys.executable, "-c", program], env=os.environ | extra, check=True, capture_output=True, text=True).stdout
        for extra in ({}, changed)
    ]
    assert "Float8CurrentScaling" in printed[0] and printed[0] == printed[1]


@pytest.mark.parametrize("recipe", [PAPER, dataclasses.replace(NVIDIA, input=RHT, grad_output=RHT)], ids=lambda recipe: recipe.name)
def test_a_module_gets_its_nvfp4_quantisers_and_its_state_can_be_saved(recipe):
    """Runs no NVFP4 kernel, so that any GPU serves."""
    modules = [make_linear(FP8), make_linear(FP8)]
    made = te_recipe(recipe)
    for linear in modules:
        with autocast(made):
            linear.prepare_forward(normal(M, K, seed=2))
            linear.end_forward()
    quantisers = [[*linear.quantizers["scaling_fwd"], *linear.quantizers["scaling_bwd"]] for linear in modules]
    given = ["NVFP4Quantizer" if recipe is not PAPER else "GivenAmaxQuantizer"] * 2
    names = [*given, "IdentityQuantizer", given[0], "IdentityQuantizer"]
    assert [[type(quantizer).__name__ for quantizer in row] for row in quantisers] == [names, names]
    assert len({id(quantizer) for row in quantisers for quantizer in row}) == 10
    state = modules[0].get_extra_state()
    assert state.numel() > 0
    make_linear(FP8).set_extra_state(state)


def stored(tensor, spec: QuantizerSpec, direction: Direction, x: Tensor) -> QuantizedTensor:
    """One direction of an NVFP4 tensor of Transformer Engine, without the padding of its scales."""
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    rows, columns = (rows, columns) if direction == "rowwise" else (columns, rows)
    nothing = torch.zeros((), dtype=torch.int64, device=x.device)
    return QuantizedTensor(
        codes=getattr(tensor, f"_{direction}_data").view(torch.uint8).reshape(rows, columns // 2),
        block_decode_scale=getattr(tensor, f"_{direction}_scale_inv").view(torch.uint8)[:rows, : columns // BLOCK],
        global_amax=getattr(tensor, f"_amax_{direction}"),
        block_shape=spec.block_shape,
        shape=tuple(x.shape),
        direction=direction,
        rht=spec.rht if direction == "columnwise" else "off",
        e4m3_bound=spec.e4m3_bound,
        saturated_elements=nothing,
        flushed_blocks=nothing,
    )


def make_quantizer(spec: QuantizerSpec):
    need(PAPER)
    from megatron_ext.precision.te_nvfp4 import quantizer_of

    return quantizer_of(spec)


@pytest.mark.parametrize("directions", [("rowwise", "columnwise"), ("rowwise",), ("columnwise",)], ids="+".join)
@pytest.mark.parametrize("shape", [(64, 128), (256, 384), (48, 80), (16, 4, 64)], ids=str)
@pytest.mark.parametrize("square", [False, True], ids=["1x16", "16x16"])
@pytest.mark.parametrize("spec", [DYNAMIC, STATIC, POW2], ids=lambda spec: spec.global_amax)
def test_native_operands_are_the_reference_s_bit_for_bit(spec, square, shape, directions):
    spec = dataclasses.replace(spec, **SQUARE) if square else spec
    quantizer, x = make_quantizer(spec), normal(*shape, seed=4, size=0.3)
    x.view(-1, x.shape[-1])[:16, :16] *= 1e-7
    x.view(-1, x.shape[-1])[5, 40] = 3.0
    quantizer.set_usage(rowwise="rowwise" in directions, columnwise="columnwise" in directions)
    quantizer.internal = True
    ours = quantizer(x)
    for direction in directions:
        reference = quantize(x, spec, direction)
        native = stored(ours, spec, direction, x)
        assert equal_values(native.global_amax, reference.global_amax)
        assert equal_scales(native.block_decode_scale, reference.block_decode_scale)
        assert equal_codes(native.codes, reference.codes, reference.block_decode_scale)


@pytest.mark.parametrize("rht", ["signed", "unsigned"])
@pytest.mark.parametrize("shape", [(128, 256), (48, 80)], ids=["fused", "unfused"])
def test_transformed_operands_differ_from_the_reference_by_the_transform_s_rounding_alone(shape, rht):
    spec = dataclasses.replace(RHT, rht=rht)
    quantizer, x = make_quantizer(spec), normal(*shape, seed=5)
    ours = quantizer(x)
    assert stored(ours, spec, "rowwise", x).same_as(quantize(x, spec))
    native, reference = stored(ours, spec, "columnwise", x), quantize(x, spec, "columnwise")
    torch.testing.assert_close(native.global_amax, reference.global_amax, rtol=2**-8, atol=0)
    assert (native.dequantize() != reference.dequantize()).double().mean() < 0.005


@pytest.mark.parametrize("recipe", [PAPER, NVIDIA], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("fused", [False, True], ids=["grad", "main_grad"])
def test_the_three_gemms_of_a_native_linear(recipe, fused):
    linear, x, dy = make_linear(recipe, fuse_wgrad_accumulation=fused), normal(M, K, seed=2, size=K**-0.5), normal(M, N, seed=3, size=1e-5)
    if fused:
        linear.weight.main_grad = torch.zeros(N, K, device="cuda")
    y, dx = run(linear, te_recipe(recipe), x, dy)
    dw = linear.weight.main_grad if fused else linear.weight.grad
    specs = {"x": recipe.input, "w": recipe.weight, "dy": recipe.grad_output}
    row, column = (
        {name: quantize(value, specs[name], direction) for name, value in (("x", x), ("w", linear.weight.detach()), ("dy", dy))}
        for direction in ("rowwise", "columnwise")
    )
    for ours, a, b in ((y, row["x"], row["w"]), (dx, row["dy"], column["w"]), (dw, column["dy"], column["x"])):
        assert gemm_within_bound(ours, qgemm(a, b, ours.dtype), a, b)


def test_a_static_amax_survives_steps_and_the_weight_cache():
    linear, x, dy = make_linear(PAPER), normal(M, K, seed=2, size=K**-0.5), normal(M, N, seed=3, size=1e-5)
    recipe = te_recipe(PAPER)
    for _ in range(2):  # the second step writes into the cached copy of the weight
        y, _ = run(linear, recipe, x, dy, is_first_microbatch=True)
        a, b = quantize(x, PAPER.input), quantize(linear.weight.detach(), PAPER.weight)
        assert gemm_within_bound(y, qgemm(a, b, y.dtype), a, b)
        cached = linear._fp8_workspaces["weight"]
        assert cached._amax_rowwise.tolist() == cached._amax_columnwise.tolist() == [1.3125]
        with torch.no_grad():
            linear.weight.mul_(1.7)


def test_stochastic_rounding_is_right_on_average_and_independent():
    """The mean over draws of each element lies where the value is, up to the 1/512 of a step that 8 random bits cost."""
    quantizer, x, draws = make_quantizer(SR), normal(64, 128, seed=6), 400
    quantizer.internal = True
    results = [quantizer(x) for _ in range(draws)]
    for direction in ("rowwise", "columnwise"):
        values = torch.stack([stored(result, SR, direction, x).dequantize() for result in results]).double()
        exact = (x if direction == "rowwise" else x.t()).double()
        inside = exact.abs() <= values.abs().amax(0)  # above 6 times its scale a value is clipped
        error, spread = values.mean(0) - exact, values.std(0)
        step = 2 * stored(results[0], SR, direction, x).dequantize().abs().amax() / 6  # the largest step of any block
        assert (error.abs() <= 6 * spread / draws**0.5 + step / 256)[inside].all()
        assert relative_error(values.mean(0)[inside], exact[inside]) < 0.3 * relative_error(values[0][inside], exact[inside])
        assert not torch.equal(values[0], values[1])
    row, column = (stored(results[0], SR, direction, x).dequantize() for direction in ("rowwise", "columnwise"))
    noise_row, noise_column = (row - x.float()).flatten(), (column.t() - x.float()).flatten()
    assert torch.corrcoef(torch.stack((noise_row, noise_column)))[0, 1].abs() < 0.1
