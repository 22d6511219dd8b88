"""`l2_normalize` and `lerp_retract` against fp64 autograd of their definitions.

The bound for a value or gradient is twice the error that plain eager PyTorch makes in the same dtype, plus 1e-5, both relative to the
largest fp64 entry. Rows of very different sizes are tested apart, so that a large row cannot hide the error of a small one.
"""

import pytest
import torch
from torch import Tensor

from ngpt.functional import l2_normalize, lerp_retract

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (5, 2, 33), (4, 127), (2, 64)]
ROWS = {"ordinary": 1.0, "unit": None, "zero": 0.0, "tiny": 1e-20, "near_eps": 1e-6, "huge": 1e18}  # typical size of an entry
BF16_ROUNDING = 2**-8  # of a correctly rounded value, relative


def definition_l2_normalize(x: Tensor, dim: int = -1) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim, keepdim=True) + 1e-12)


def definition_lerp_retract(h: Tensor, b: Tensor, alpha: Tensor) -> Tensor:
    g = definition_l2_normalize(h)
    return definition_l2_normalize(g + alpha.abs() * (definition_l2_normalize(b) - g))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def random_rows(shape: tuple[int, ...], kind: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    x = x / x.norm(dim=-1, keepdim=True) if kind == "unit" else x * ROWS[kind]
    return x.to(dtype)


def random_alpha(size: int, generator: torch.Generator) -> Tensor:
    """Eigen learning rates around the paper's 0.05, of both signs."""
    return 0.05 * (0.5 + torch.rand(size, generator=generator)) * torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)


def value_and_gradients(function, inputs: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_output.to(out.dtype))]


def error(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-300)).item()


def assert_within_twice_eager_error(function, definition, inputs: list[Tensor], grad_output: Tensor) -> None:
    actual = value_and_gradients(function, inputs, grad_output)
    eager = value_and_gradients(definition, [x.to(inputs[0].dtype) for x in inputs], grad_output)
    truth = value_and_gradients(definition, [x.double() for x in inputs], grad_output.double())
    for name, a, e, t in zip(["output", "grad 0", "grad 1", "grad 2"], actual, eager, truth, strict=False):
        assert a.isfinite().all(), name
        assert error(a, t) <= 2 * error(e, t) + 1e-5, name
    for x, gradient in zip(inputs, actual[1:], strict=True):
        assert gradient.dtype == x.dtype and gradient.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_l2_normalize_and_its_gradient_match_fp64(shape, kind, dtype, generator):
    x = random_rows(shape, kind, dtype, generator)
    grad_output = torch.randn(shape, generator=generator).to(dtype)
    assert_within_twice_eager_error(l2_normalize, definition_l2_normalize, [x], grad_output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_l2_normalize_works_along_other_dims_and_on_transposed_input(dim, dtype, generator):
    x = random_rows((9, 3, 5), "ordinary", dtype, generator).transpose(0, 2)
    grad_output = torch.randn(9, 3, 5, generator=generator).to(dtype).transpose(0, 2)
    assert_within_twice_eager_error(lambda x: l2_normalize(x, dim=dim), lambda x: definition_l2_normalize(x, dim), [x], grad_output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b_kind", ROWS)
@pytest.mark.parametrize("h_kind", ROWS)
def test_lerp_retract_and_its_gradients_match_fp64(h_kind, b_kind, dtype, generator):
    for shape in SHAPES[1:]:
        h, b = random_rows(shape, h_kind, dtype, generator), random_rows(shape, b_kind, dtype, generator)
        alpha = random_alpha(shape[-1], generator)
        grad_output = torch.randn(shape, generator=generator).to(dtype)
        assert_within_twice_eager_error(lerp_retract, definition_lerp_retract, [h, b, alpha], grad_output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lerp_retract_accepts_any_alpha_size(dtype, generator):
    """Alphas above one overshoot b, an alpha of one lands on it, and a zero alpha only normalises h."""
    h, b = (random_rows((6, 33), "ordinary", dtype, generator) for _ in range(2))
    grad_output = torch.randn(6, 33, generator=generator).to(dtype)
    for alpha in (torch.full((33,), 1.7), torch.full((33,), -1.0), torch.randn(33, generator=generator)):
        assert_within_twice_eager_error(lerp_retract, definition_lerp_retract, [h, b, alpha], grad_output)
    torch.testing.assert_close(
        lerp_retract(h, b, torch.zeros(33)).float(), definition_l2_normalize(h.float()), rtol=BF16_ROUNDING, atol=1e-6
    )


@pytest.mark.parametrize("function", ["l2_normalize", "lerp_retract"])
def test_bf16_output_is_the_fp64_value_rounded_once(function, generator):
    """Fails if any intermediate is bf16: the mathematics runs in fp32 whatever the dtype of the tensors."""
    h, b = (random_rows((64, 127), "ordinary", torch.bfloat16, generator) for _ in range(2))
    alpha = random_alpha(127, generator)
    if function == "l2_normalize":
        actual, truth = l2_normalize(h), definition_l2_normalize(h.double())
    else:
        actual, truth = lerp_retract(h, b, alpha), definition_lerp_retract(h.double(), b.double(), alpha.double())
    assert actual.dtype == torch.bfloat16
    assert ((actual.double() - truth).abs() <= truth.abs() * BF16_ROUNDING * 1.001 + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_give_zero_and_finite_gradients_beside_ordinary_rows(dtype, generator):
    h, b = (random_rows((4, 33), "ordinary", dtype, generator) for _ in range(2))
    grad_output, alpha = torch.randn(4, 33, generator=generator).to(dtype), random_alpha(33, generator)
    with_zero_h, with_zero_b = h.clone(), b.clone()
    with_zero_h[1], with_zero_b[1] = 0, 0
    normal = value_and_gradients(l2_normalize, [h], grad_output)
    zeroed = value_and_gradients(l2_normalize, [with_zero_h], grad_output)
    assert zeroed[0][1].eq(0).all()
    kept = [0, 2, 3]
    for a, e in zip(zeroed, normal, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a[kept], e[kept], rtol=0, atol=0)
    output, *gradients = value_and_gradients(lerp_retract, [with_zero_h, with_zero_b, alpha], grad_output)
    assert output[1].eq(0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(output[kept], lerp_retract(h, b, alpha)[kept], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lerp_retract_output_is_on_the_unit_sphere_whatever_the_input_lengths(dtype, generator):
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    for kind in ("ordinary", "unit", "huge"):
        h, b = random_rows((9, 127), kind, dtype, generator), random_rows((9, 127), "ordinary", dtype, generator)
        norms = lerp_retract(h, b, random_alpha(127, generator)).double().norm(dim=-1)
        assert (norms - 1).abs().max() < bound


def test_gradient_of_a_row_has_no_radial_part(generator):
    """Changing the length of a row changes nothing, so its gradient is orthogonal to it; a scaled unit row must show it too."""
    for kind in ("ordinary", "unit", "huge"):
        x, b = (random_rows((9, 127), kind, torch.float32, generator) for _ in range(2))
        grad_output = x.sign() + torch.randn(9, 127, generator=generator)
        gradients = value_and_gradients(l2_normalize, [x], grad_output)[1:]
        gradients += value_and_gradients(lerp_retract, [x, b, random_alpha(127, generator)], grad_output)[1:3]
        for row, gradient in zip([x, x, b], gradients, strict=True):
            cosine = torch.nn.functional.cosine_similarity(
                row.double() / ROWS["huge"], gradient.double() * ROWS["huge"], dim=-1, eps=1e-300
            )
            assert cosine.abs().max() < 1e-5, kind


def test_inputs_are_not_changed_and_a_frozen_input_gets_no_gradient(generator):
    h, b = (random_rows((3, 7), "ordinary", torch.float32, generator) for _ in range(2))
    alpha, copies = random_alpha(7, generator), (h.clone(), b.clone())
    b.requires_grad_()
    lerp_retract(h, b, alpha).sum().backward()
    assert h.grad is None and alpha.grad is None and b.grad is not None
    assert h.equal(copies[0]) and b.detach().equal(copies[1])


def test_no_rows_give_no_rows():
    x = torch.zeros(0, 8, requires_grad=True)
    b = torch.zeros(0, 8)
    alpha = torch.ones(8, requires_grad=True)
    assert l2_normalize(x).shape == (0, 8)
    lerp_retract(x, b, alpha).sum().backward()
    assert alpha.grad.eq(0).all()
