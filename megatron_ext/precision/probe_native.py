"""Numbers that `ngpt doctor` asks of Transformer Engine's own kernels, where this hardware has them. See probe.py.

Transformer Engine is imported inside the functions, after `unavailable` has found that it imports.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megatron_ext.precision.probe import (
    BF16_ROUNDING,
    FP4_ERROR,
    NONZERO,
    K,
    N,
    amax_of_blocks,
    exact_products,
    operands,
    reference_operands,
    relative,
    shipped_recipes,
    unclipped,
)
from megatron_ext.precision.te_recipes import autocast, te_recipe, unavailable
from ngpt.findings import UNAVAILABLE, Finding, attempt
from ngpt.precision import QuantizerSpec, qgemm, quantize
from ngpt.precision.tensor import equal_values
from ngpt.recipes import Recipe

NATIVE = "nvfp4 native"
FP8_ERROR = 0.1  # of products of E4M3 and E5M2 operands: 0.037 and 0.06 on such inputs
RHT_ERROR = 0.01  # a few elements of the transform may be rounded differently before they are quantised
DRAWS = 64
ROUNDING_BIAS = 0.005  # of the mean magnitude: 8 random bits are biased towards zero by 1/512 of a step


def probe_native() -> Iterator[Finding]:
    """Checks of fp8, mxfp8 and nvfp4 by Transformer Engine, or why it cannot compute them here."""
    for name, recipe in shipped_recipes("fp8", "mxfp8").items():
        if reason := unavailable(recipe):
            yield Finding(name, "three products", UNAVAILABLE, reason)
        else:
            yield attempt(name, "three products", near_fp64, recipe)
    reasons: dict[str, list[str]] = {}
    for name, recipe in shipped_recipes("nvfp4").items():
        if reason := unavailable(recipe):
            reasons.setdefault(reason, []).append(name)
            continue
        nearest = replace(recipe, grad_output=replace(recipe.grad_output, rounding="rtne"))
        yield attempt(NATIVE, f"quantise, {name}", same_values, nearest)
        yield attempt(NATIVE, f"three products, {name}", three_products, nearest)
        if recipe.grad_output.global_amax != "static":  # which flushes small gradients, as it is told to
            yield attempt(NATIVE, f"gradients, {name}", live_gradients, recipe)
        if recipe.grad_output.rounding == "sr":
            yield attempt(NATIVE, f"stochastic rounding, mean, {name}", rounding_mean, recipe.grad_output)
    for reason, names in reasons.items():
        yield Finding(NATIVE, f"three products, {', '.join(names)}", UNAVAILABLE, reason)


def linear_results(recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """y [M, N] and dx [M, K] in bf16, dw [N, K] as added to an fp32 gradient buffer of zeros, by Transformer Engine's linear."""
    import transformer_engine.pytorch as te

    x_MK, w_NK, dy_MN = (tensor.cuda() for tensor in operands().values())
    x_MK.requires_grad_()
    linear = te.Linear(K, N, bias=False, params_dtype=torch.bfloat16, fuse_wgrad_accumulation=True)
    with torch.no_grad():
        linear.weight.copy_(w_NK)
    linear.weight.main_grad = torch.zeros(N, K, device="cuda")
    with autocast(te_recipe(recipe)):
        y_MN = linear(x_MK)
    y_MN.backward(dy_MN)
    return y_MN.detach(), x_MK.grad, linear.weight.main_grad


@torch.no_grad()
def round_trip(x: Tensor, spec: QuantizerSpec) -> Tensor:
    """fp32 [M, K] on the CPU: quantised rowwise by Transformer Engine's kernels and dequantised by them."""
    from megatron_ext.precision.te_nvfp4 import quantizer_of

    return quantizer_of(spec)(x.cuda()).dequantize(dtype=torch.float32).cpu()


def near_fp64(recipe: Recipe) -> tuple[bool, str]:
    """The three products against fp64 products of the operands before they are quantised."""
    errors = {name: relative(got, wanted) for (name, wanted), got in zip(exact_products().items(), linear_results(recipe), strict=True)}
    figures = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return all(error < FP8_ERROR for error in errors.values()), f"{figures} of the fp64 products, bound {FP8_ERROR:g}"


def same_values(recipe: Recipe) -> tuple[bool, str]:
    """Rowwise dequantised operands against the reference, bit for bit."""
    given, wrong = operands(), []
    for name, x in given.items():
        spec = getattr(recipe, name)
        if not equal_values(round_trip(x, spec), quantize(x, spec).dequantize()):
            wrong.append(name)
    compared = sum(x.numel() for x in given.values())
    return not wrong, f"differ: {', '.join(wrong)}" if wrong else f"{compared:,} elements bit-identical"


def three_products(recipe: Recipe) -> tuple[bool, str]:
    """The three products against fp64 products of the operands: as the reference quantises them, and not quantised."""
    bound, truth = BF16_ROUNDING if recipe.input.rht == "off" else RHT_ERROR, exact_products()
    figures, passed = [], True
    for (name, a, b), ours in zip(reference_operands(recipe, operands()), linear_results(recipe), strict=True):
        error, unquantised = relative(ours, qgemm(a, b).double()), relative(ours, truth[name])
        passed = passed and error < bound and unquantised < FP4_ERROR
        figures.append(f"{name} {error:.1e} ({unquantised:.2f} unquantised)")
    return passed, f"{', '.join(figures)}, bounds {bound:.1e} and {FP4_ERROR:g}"


def live_gradients(recipe: Recipe) -> tuple[bool, str]:
    """Stochastically rounded gradients are finite and not zero."""
    shares = {}
    for name, gradient in zip(("dx", "dw"), linear_results(recipe)[1:], strict=True):
        shares[name] = (gradient.isfinite() & (gradient != 0)).double().mean().item()
    return min(shares.values()) > NONZERO, ", ".join(f"{name} {share:.1%} finite and nonzero" for name, share in shares.items())


def rounding_mean(spec: QuantizerSpec) -> tuple[bool, str]:
    """The mean of stochastic rounding over draws against the tensor itself."""
    x = operands()["grad_output"].double()
    mean = torch.stack([round_trip(x.bfloat16(), spec).double() for _ in range(DRAWS)]).mean(0)
    kept = unclipped(x, amax_of_blocks(x))
    bias = (((mean - x) * x.sign())[kept].sum() / x[kept].abs().sum()).item()
    return abs(bias) < ROUNDING_BIAS, f"bias {bias:+.1e} of the magnitude, bound {ROUNDING_BIAS:g}"
