"""Products of all experts by Transformer Engine, against the same products one by one."""

import pytest
import torch
from torch import Tensor

from megatron_ext.precision import grouped
from megatron_ext.precision.grouped import ExpertTokens, emulated_grouped_linear
from megatron_ext.precision.linear import LinearCall
from ngpt.config import compose
from ngpt.config.recipes import recipe_of
from ngpt.recipes import Recipe

pytestmark = pytest.mark.gpu

SIZES = [19, 0, 64, 1, 700, 0]
K, N = 256, 144


@pytest.fixture(autouse=True)
def need_transformer_engine():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("transformer_engine.pytorch", reason="needs the package transformer-engine")


def normal(*shape: int, seed: int, dtype=torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def relative_error(ours: Tensor, wanted: Tensor) -> float:
    return ((ours.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("layout", ["TN", "NN", "NT"])
@pytest.mark.parametrize(("dtype", "accumulate"), [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True)], ids=str)
def test_products_of_all_experts_are_those_of_one_after_the_other(layout, dtype, accumulate):
    tokens = ExpertTokens(SIZES, torch.device("cuda"))
    total, weights = sum(tokens.sizes), normal(len(SIZES) * N, K, seed=1).chunk(len(SIZES))
    x, dy = tokens.split(normal(total, K, seed=2)), tokens.split(normal(total, N, seed=3))
    a, b, rows, columns = {"TN": (weights, x, total, N), "NN": (weights, dy, total, K), "NT": (x, dy, len(SIZES) * N, K)}[layout]
    results = []
    for gemm in (grouped._gemm_of_transformer_engine, grouped._gemm_one_by_one):
        out = normal(rows, columns, seed=4, dtype=dtype)
        gemm(layout, a, b, out.chunk(len(SIZES)) if layout == "NT" else tokens.split(out), accumulate)
        results.append(out)
    # Both add up in fp32, in another order; then one rounding.
    assert relative_error(*results) < (2.0**-8 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", ["nvfp4_paper", "nvfp4_static"])
def test_a_linear_on_the_gpu_is_the_one_on_the_cpu(name):
    """Quantisers have the same bits on both; the products add up in another order."""
    recipe = recipe_of(compose(["experiment=ngpt_hybrid_tiny", f"precision={name}", "precision.stochastic_rounding=false"]).precision)
    ours, wanted = (run(recipe, device) for device in ("cuda", "cpu"))
    for on_gpu, on_cpu in zip(ours, wanted, strict=True):
        assert relative_error(on_gpu.cpu(), on_cpu) < 2.0**-8 if on_cpu.any() else not on_gpu.any()


def run(recipe: Recipe, device: str) -> list[Tensor]:
    """Output, gradient of the input, and main_grads after two micro-batches."""
    x = torch.nn.functional.normalize(normal(sum(SIZES), K, seed=5), dim=-1).to(device).requires_grad_()
    weights = [torch.nn.functional.normalize(normal(N, K, seed=6 + e), dim=-1).to(device).requires_grad_() for e in range(len(SIZES))]
    for weight in weights:
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(N, K, device=device), False
    dy = normal(sum(SIZES), N, seed=20).to(device)
    for _ in range(2):
        y = emulated_grouped_linear(x, weights, SIZES, LinearCall(recipe=recipe, rounding_seed=lambda: 7))
        y.backward(dy)
    assert all(weight.grad_added_to_main_grad for weight in weights)
    return [y.detach(), x.grad, *(weight.main_grad for weight in weights)]
