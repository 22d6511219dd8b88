"""Numbers that `ngpt doctor` asks of a device, compared with the reference quantiser and fp64 products on the CPU.

Capability checks are not trusted: on some GPUs all of them passed, and stochastically rounded gradients were all zeros.

Shapes: x_MK tokens by input features, w_NK, dy_MN.
"""

import functools
import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from megatron_ext.precision.linear import LinearCall, emulated_linear
from ngpt.config import compose
from ngpt.config.folders import config_dir
from ngpt.config.recipes import recipe_of
from ngpt.findings import Finding, attempt
from ngpt.kernels.nvfp4_quantize import emulate, quantize_packed
from ngpt.precision import QuantizedTensor, qgemm, quantize
from ngpt.precision.check_golden import gemm_within_bound
from ngpt.precision.philox import random_bits
from ngpt.precision.rounding import operand_seed
from ngpt.precision.tensor import Operand
from ngpt.recipes import BLOCK, DIRECTIONS, Direction, OperandSpec, QuantizerSpec, Recipe

BF16, EMULATED = "bf16", "nvfp4 emulated"
M, K, N = 256, 256, 384  # multiples of 128: every kernel takes them
SEED = 20_251
DRAWS = 32  # for the mean of stochastic rounding
STANDARD_ERRORS = 5.0
NOT_CLIPPED = 0.9  # of the block's amax
NONZERO = 0.95  # of a gradient's elements
BF16_ROUNDING = 2.0**-8
FP4_ERROR = 0.25  # of a product of quantised operands; a forgotten scale, of 448/256 for instance, is beyond it
# Digest of what `known_answer` quantises, made by the quantiser that reproduces the golden vectors bit for bit.
KNOWN_DIGEST = "a14035057f30ab8d"


def probe_emulated(device: torch.device) -> Iterator[Finding]:
    """Checks all that emulated NVFP4 training rounds and multiplies on a device, and the bf16 product it is made of."""
    yield attempt(BF16, "product", bf16_product, device)
    yield attempt(EMULATED, "reference, known answer", known_answer)
    for name, recipe in shipped_recipes("nvfp4").items():
        rounding = "stochastic rounding" if recipe.grad_output.rounding == "sr" else "gradient rounding"
        forward = {"input": recipe.input, "weight": recipe.weight}
        yield attempt(EMULATED, f"quantise, {name}", same_bits, forward, device)
        yield attempt(EMULATED, f"{rounding}, {name}", same_bits, {"grad_output": recipe.grad_output}, device)
        yield attempt(EMULATED, f"three products, {name}", three_products, recipe, device)
    paper = shipped_recipe("nvfp4_paper")
    yield attempt(EMULATED, "stochastic rounding, mean", rounding_mean, paper.grad_output, device)
    yield attempt(EMULATED, "gradients", live_gradients, paper, device)


def shipped_recipes(*formats: str) -> dict[str, Recipe]:
    """Every recipe of conf/precision with one of these formats, by name."""
    recipes = {path.stem: shipped_recipe(path.stem) for path in sorted((config_dir() / "precision").glob("*.yaml"))}
    return {name: recipe for name, recipe in recipes.items() if recipe.format in formats}


@functools.cache
def shipped_recipe(name: str, *changes: str) -> Recipe:
    """The recipe of conf/precision/<name>.yaml, with overrides such as "precision.executor=native"."""
    return recipe_of(compose(["experiment=ngpt_tiny", f"precision={name}", *changes]).precision)


def operands() -> dict[str, Tensor]:
    """bf16 input [M, K] and weight [N, K] of unit rows and grad_output [M, N], on the CPU, the same on every machine.

    Rows of grad_output differ in size by up to 2^14, as those of tokens do; one is zero.
    """
    x_MK, w_NK, dy_MN = (uniform(rows, columns, stream) for stream, (rows, columns) in enumerate(((M, K), (N, K), (M, N))))
    dy_MN = dy_MN * 2.0 ** -(10 + torch.arange(M) % 15).view(-1, 1)
    dy_MN[3] = 0
    return {
        "input": normalize(x_MK, dim=-1).bfloat16(),
        "weight": normalize(w_NK, dim=-1).bfloat16(),
        "grad_output": dy_MN.bfloat16(),
    }


def uniform(rows: int, columns: int, stream: int = 0) -> Tensor:
    """fp32 [rows, columns] multiples of 2^-15 between -1 and 1, the same on every machine."""
    return random_bits(SEED, stream, range(rows), columns).float() * 2.0**-15 - 1


def bf16_product(device: torch.device) -> tuple[bool, str]:
    """A bf16 product with bf16 output against fp64."""
    given = operands()
    got = given["input"].to(device) @ given["weight"].to(device).t()
    difference = relative(got, given["input"].double() @ given["weight"].double().t())
    return difference < BF16_ROUNDING, f"{difference:.1e} of the fp64 product, bound {BF16_ROUNDING:.1e}"


def known_answer() -> tuple[bool, str]:
    """The reference quantiser of this machine's torch against a stored digest, on exactly representable inputs."""
    values = uniform(64, 128) * 2.0 ** (torch.arange(64) % 8 - 4).view(-1, 1)
    digest = hashlib.sha256()
    for spec in (QuantizerSpec(), QuantizerSpec((BLOCK, BLOCK), "static"), QuantizerSpec(rht="signed", rounding="sr")):
        for direction in ("rowwise", "columnwise"):
            quantized = quantize(values, spec, direction, seed=SEED if spec.rounding == "sr" else None)
            for part in (quantized.codes, quantized.block_decode_scale, quantized.global_amax):
                digest.update(part.numpy().tobytes())
    found = digest.hexdigest()[:16]
    return found == KNOWN_DIGEST, f"digest {found}" + ("" if found == KNOWN_DIGEST else f", expected {KNOWN_DIGEST}")


def same_bits(specs: dict[str, OperandSpec], device: torch.device) -> tuple[bool, str]:
    """Packed and emulated operands of the device against the reference, bit for bit, both directions."""
    given, compared, wrong = operands(), 0, []
    for name, spec in specs.items():
        x = given[name].to(device)
        for direction, packed, operand in zip(DIRECTIONS, quantize_packed(x, spec, seed=SEED), emulate(x, spec, seed=SEED), strict=True):
            expected = reference(given[name], spec, direction)
            compared += given[name].numel()
            if not on_cpu(packed).same_as(expected):
                wrong.append(f"packed {name} {direction}")
            if different := differing_values(operand, expected):
                wrong.append(f"{different} values of {name} {direction}")
    return not wrong, f"differ: {', '.join(wrong)}" if wrong else f"{compared:,} elements bit-identical, packed and as operands"


def reference(x: Tensor, spec: OperandSpec, direction: Direction, seed: int = SEED) -> QuantizedTensor:
    """The reference quantiser's result for an operand in one direction."""
    own = getattr(spec, direction)
    return quantize(x, own, direction, seed=seed if own.rounding == "sr" else None)


def on_cpu(quantized: QuantizedTensor) -> QuantizedTensor:
    """A copy on the CPU."""
    return QuantizedTensor.from_tensors({name: tensor.cpu() for name, tensor in quantized.to_tensors().items()})


def differing_values(operand: Operand, expected: QuantizedTensor) -> int:
    """How many values of an emulated operand, with the scale it leaves to the product, are not those of the reference."""
    wanted = expected.decode().double() * expected.decode_factor.cpu()
    return int((decoded(operand) != (wanted if expected.direction == "rowwise" else wanted.t())).sum())


def three_products(recipe: Recipe, device: torch.device) -> tuple[bool, str]:
    """y, dx and dw of an emulated linear against fp64 products of the operands: as the reference quantises them, and not quantised."""
    given, truth = operands(), exact_products()
    got = linear_results(recipe, device, SEED)
    figures, problems = [], []
    for (name, a, b), ours in zip(reference_operands(recipe, given), got, strict=True):
        expected, error = qgemm(a, b, ours.dtype), relative(ours, truth[name])
        if not gemm_within_bound(ours.cpu(), expected, a, b):
            problems.append(f"an element of {name} beyond 4e-7 sum|ab| and its rounding")
        if not error < FP4_ERROR:
            problems.append(f"{name} beyond {FP4_ERROR:g} of the product that is not quantised")
        figures.append(f"{name} {relative(ours, expected.double()):.1e} ({error:.2f} unquantised)")
    return not problems, ", ".join([*figures, *problems])


def exact_products() -> dict[str, Tensor]:
    """fp64 products of the operands before they are quantised, on the CPU."""
    x, w, dy = (tensor.double() for tensor in operands().values())
    return {"fprop": x @ w.t(), "dgrad": dy @ w, "wgrad": dy.t() @ x}


def reference_operands(recipe: Recipe, given: dict[str, Tensor]) -> Iterator[tuple[str, QuantizedTensor, QuantizedTensor]]:
    """(name, a, b) of the products a b^T of a linear."""

    def quantized(name: str, direction: Direction) -> QuantizedTensor:
        return reference(given[name], getattr(recipe, name), direction, operand_seed(SEED, name))

    yield "fprop", quantized("input", "rowwise"), quantized("weight", "rowwise")
    yield "dgrad", quantized("grad_output", "rowwise"), quantized("weight", "columnwise")
    yield "wgrad", quantized("grad_output", "columnwise"), quantized("input", "columnwise")


def linear_results(recipe: Recipe, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """y [M, N] and dx [M, K] in bf16, dw [N, K] as added to an fp32 gradient buffer of zeros."""
    x_MK, w_NK, dy_MN = (tensor.to(device) for tensor in operands().values())
    x_MK.requires_grad_()
    w_NK.requires_grad_()
    w_NK.main_grad, w_NK.grad_added_to_main_grad = torch.zeros(N, K, device=device), False
    y_MN = emulated_linear(x_MK, w_NK, LinearCall(recipe=recipe, rounding_seed=lambda: seed))
    y_MN.backward(dy_MN)
    return y_MN.detach(), x_MK.grad, w_NK.main_grad


def rounding_mean(spec: QuantizerSpec, device: torch.device) -> tuple[bool, str]:
    """The mean of stochastic rounding over seeds against the tensor itself, both directions; errors in units of the block's amax."""
    x_MN = operands()["grad_output"].double()
    rounded = [emulate(x_MN.bfloat16().to(device), spec, seed=SEED + draw) for draw in range(DRAWS)]
    figures, passed = [], True
    for index, (name, block_amax) in enumerate((("rowwise", amax_of_blocks(x_MN)), ("columnwise", amax_of_blocks(x_MN.t()).t()))):
        kept = unclipped(x_MN, block_amax)
        outward = torch.stack([((decoded(pair[index]) - x_MN) * x_MN.sign() / block_amax)[kept].mean() for pair in rounded])
        bias, spread = outward.mean().item(), outward.std().item()
        errors = abs(bias) / (spread / math.sqrt(DRAWS)) if spread else math.inf
        passed = passed and errors < STANDARD_ERRORS
        figures.append(f"{name} bias {bias:+.1e}, {errors:.1f} standard errors")
    return passed, f"{'; '.join(figures)}; bound {STANDARD_ERRORS:g}"


def amax_of_blocks(x: Tensor) -> Tensor:
    """x's shape: the amax of the 1x16 block of each element."""
    return x.abs().reshape(len(x), -1, BLOCK).amax(2).repeat_interleave(BLOCK, dim=1)


def unclipped(x: Tensor, block_amax: Tensor) -> Tensor:
    """Where stochastic rounding has x for its mean: the largest elements of a block are clipped if its scale was rounded down."""
    return (x != 0) & (x.abs() < NOT_CLIPPED * block_amax)


def decoded(operand: Operand) -> Tensor:
    """fp64 values on the CPU, the global scale applied."""
    factor = operand.decode_factor
    values = operand.values.cpu().double()
    return values if factor is None else values * factor.cpu()


def live_gradients(recipe: Recipe, device: torch.device) -> tuple[bool, str]:
    """Stochastically rounded gradients are finite and not zero, the same for the same seed and different for another."""
    first, again, other = (linear_results(recipe, device, seed) for seed in (SEED, SEED, SEED + 1))
    figures, passed = [], True
    for name, mine, repeated, redrawn in list(zip(("dx", "dw"), first[1:], again[1:], other[1:], strict=True)):
        nonzero = (mine != 0).double().mean().item()
        problems = [] if nonzero > NONZERO else ["vanishes"]
        problems += [] if mine.isfinite().all() else ["not finite"]
        problems += [] if torch.equal(mine, repeated) else ["another result for the same seed"]
        problems += [] if not torch.equal(mine, redrawn) else ["the same result for another seed"]
        passed = passed and not problems
        figures.append(f"{name} {nonzero:.1%} nonzero" + "".join(f", {problem}" for problem in problems))
    return passed, "; ".join(figures)


def relative(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of `wanted`, fp64 on the CPU."""
    return ((got.detach().cpu().double() - wanted).norm() / wanted.norm()).item()
