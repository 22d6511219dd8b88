"""The linears of all experts on a GPU: in high precision against fp64, emulated against the CPU."""

import pytest
import torch
from torch import Tensor

from megatron_ext.precision.grouped import emulated_grouped_linear, grouped_linear
from megatron_ext.precision.linear import LinearCall
from ngpt.config import compose
from ngpt.config.recipes import recipe_of
from ngpt.recipes import Recipe

pytestmark = pytest.mark.gpu

SIZES = [19, 0, 64, 1, 700, 0]
K, N = 256, 144


def normal(*shape: int, seed: int, dtype=torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def relative_error(ours: Tensor, wanted: Tensor) -> float:
    return ((ours.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("sizes", [SIZES, [0, 0, 96], [0, 0], [5000, 1, 0, 0, 3]], ids=str)
def test_a_linear_in_high_precision_is_that_of_fp64(sizes, dtype, bound):
    """Output and gradients within one rounding; main_grad sums two micro-batches in fp32, and experts without tokens get none."""
    x = normal(sum(sizes), K, seed=1, dtype=dtype).requires_grad_()
    weight = (normal(len(sizes) * N, K, seed=2, dtype=dtype) / 16).requires_grad_()
    dy = normal(sum(sizes), N, seed=3, dtype=dtype)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape, device="cuda"), False
    for _ in range(2):
        x.grad = None
        y = grouped_linear(x, weight, sizes)
        y.backward(dy)
    assert weight.grad_added_to_main_grad
    own = zip(x.detach().double().split(sizes), dy.double().split(sizes), weight.detach().double().chunk(len(sizes)), strict=True)
    wanted = [torch.cat(parts) for parts in zip(*((a @ w.t(), g @ w, 2 * g.t() @ a) for a, g, w in own), strict=True)]
    in_fp32 = 2.0**-23 * max(16, max(sizes) / 16)  # tensor cores add 16 products at a time and cut off what fp32 does not hold
    for found, right, limit in zip((y, x.grad, weight.main_grad), wanted, (bound, bound, in_fp32), strict=True):
        assert found.shape == right.shape
        assert relative_error(found, right) < limit if right.any() else not found.any()


@pytest.mark.parametrize("name", ["nvfp4_paper", "nvfp4_static"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_emulated_linear_on_the_gpu_is_the_one_on_the_cpu(name, dtype):
    """Quantisers have the same bits on both; the products add up in another order."""
    recipe = recipe_of(compose(["experiment=ngpt_hybrid_tiny", f"precision={name}", "precision.stochastic_rounding=false"]).precision)
    ours, wanted = (run(recipe, dtype, device) for device in ("cuda", "cpu"))
    for on_gpu, on_cpu in zip(ours, wanted, strict=True):
        assert relative_error(on_gpu.cpu(), on_cpu) < (2.0**-8 if dtype == torch.bfloat16 else 1e-6)


def run(recipe: Recipe, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Output, gradient of the input, and main_grad after two micro-batches."""
    x = torch.nn.functional.normalize(normal(sum(SIZES), K, seed=5), dim=-1).to(device, dtype).requires_grad_()
    weight = torch.nn.functional.normalize(normal(len(SIZES) * N, K, seed=6), dim=-1).to(device, dtype).requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape, device=device), False
    dy = normal(sum(SIZES), N, seed=20).to(device, dtype)
    for _ in range(2):
        y = emulated_grouped_linear(x, weight, SIZES, LinearCall(recipe=recipe, rounding_seed=lambda: 7))
        y.backward(dy)
    assert weight.grad_added_to_main_grad
    return [y.detach(), x.grad, weight.main_grad]
