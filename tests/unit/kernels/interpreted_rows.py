"""The row-wise Triton kernels in the interpreter. test_rows_triton.py runs this with TRITON_INTERPRET=1."""

import dataclasses

import pytest
import torch
from row_cases import ACTIVATIONS, FACTOR, OPERATIONS, ROWS, check, kernels_for, make_inputs, plain_l2, problems, value_and_gradients
from torch import Tensor

from ngpt.config.activations import ACTIVATIONS as TABLE
from ngpt.functional import l2_normalize, scaled_activation
from ngpt.kernels.activation import triton as activation
from ngpt.kernels.normalize import triton as normalize
from ngpt.kernels.scale import triton as scale

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
TILINGS = [(normalize, name) for name in ("FORWARD", "BACKWARD", "LERP_FORWARD", "LERP_BACKWARD")]
TILINGS += [(scale, name) for name in ("FORWARD", "BACKWARD", "TOKENS")]
TILINGS += [(activation, name) for name in ("FORWARD", "BACKWARD")]
# Leading dimensions and width; one row, odd numbers of rows and of columns, more tiles than programs, several columns of tiles.
SHAPES = [(1, 1), (3, 7), (2, 5, 33), (22, 16), (5, 520)]
SIZES = [3, 0, 19, 1, 0, 4, 0]
# Where rows lie has nothing to do with the function of an activation: two stand for all.
LAYOUTS = [name for name in OPERATIONS if ACTIVATIONS.get(name, "swiglu") in ("squared_relu", "swiglu")]


@pytest.fixture(autouse=True)
def small_tiles_in_poisoned_memory(monkeypatch):
    """Few elements a tile and three programs, so that small tensors have several tiles a program; memory starts as NaN."""
    for module, name in TILINGS:
        monkeypatch.setattr(module, name, dataclasses.replace(getattr(module, name), warps=1, elements=8, resident=3, widest=0))
    poison(monkeypatch)


def poison(monkeypatch) -> None:
    """Memory starts as NaN."""

    def poisoned(empty):
        def make(*args, **kwargs) -> Tensor:
            x = empty(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else 123456)

        return make

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def inputs_and_grad(operation: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    if operation == "scale_tokens":
        shape = (torch.Size(shape[:-1]).numel(), shape[-1])
    inputs = make_inputs(operation, shape, dtype, generator)
    return inputs, torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_shape(operation, dtype, generator):
    for shape in SHAPES if operation != "lerp_retract" else SHAPES[1:]:
        assert not check(operation, *inputs_and_grad(operation, shape, dtype, generator)), shape


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_step_of_one_feature_has_no_gradient_but_rounding(dtype, generator):
    """Its direction cannot change: the true gradient is zero."""
    (h, b, alpha), grad = inputs_and_grad("lerp_retract", (5, 1), dtype, generator)
    with kernels_for("cpu"):
        _, *grads = value_and_gradients(OPERATIONS["lerp_retract"][0], [h, b, alpha], grad)
    for found, x in zip(grads, (h, b), strict=False):
        assert (found * x).abs().max() <= 2**-21 * grad.abs().max()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("operation", ["l2_normalize", "lerp_retract"])
def test_rows_of_any_size(operation, dtype, generator):
    """Also of zeros, alone and between ordinary ones."""
    for kind, size in ROWS.items():
        inputs, grad = inputs_and_grad(operation, (9, 33), dtype, generator)
        inputs[0] *= size
        assert not check(operation, inputs, grad), kind
    inputs, grad = inputs_and_grad(operation, (9, 33), dtype, generator)
    for x in inputs[: 2 if operation == "lerp_retract" else 1]:
        x[4] = 0
    assert not check(operation, inputs, grad)


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.7])
def test_steps_of_any_size(rate, generator):
    inputs, grad = inputs_and_grad("lerp_retract", (6, 33), FP32, generator)
    assert not check("lerp_retract", [*inputs[:2], torch.full((33,), rate)], grad)


@pytest.mark.parametrize("operation", ["squared_relu", "normalized swiglu"])
@pytest.mark.parametrize("sizes", [SIZES, [0, 0, 71], [1], [58, 1, 0]], ids=str)
def test_groups_of_any_size(sizes, operation, generator):
    for width in (7, 40):
        inputs = make_inputs(operation, (sum(sizes), width), BF16, generator, len(sizes))
        grad = torch.randn(sum(sizes), width, generator=generator).to(BF16)
        assert not check(operation, inputs, grad, sizes)
        with kernels_for("cpu"):
            grad_scale = value_and_gradients(OPERATIONS[operation][0], inputs, grad, sizes)[2]
        assert grad_scale[[size == 0 for size in sizes]].eq(0).all()


def test_sizes_that_do_not_fit_are_refused(generator):
    u, suv = make_inputs("squared_relu", (8, 4), FP32, generator, 2)
    for sizes in ([4, 3], [8], [4, 2, 2]):
        with kernels_for("cpu"), pytest.raises(ValueError, match="sizes: .* groups of .* rows in all"):
            OPERATIONS["squared_relu"][0](u, suv, sizes)


@pytest.mark.parametrize("operation", ACTIVATIONS)
def test_activations_of_any_size(operation, generator):
    """Also of zeros, alone and between ordinary rows; what is broken stays broken, in its row alone."""
    for size in (0.0, 1e-6, 1e4):
        inputs, grad = inputs_and_grad(operation, (9, 33), FP32, generator)
        inputs[0] *= size
        assert not check(operation, inputs, grad), size
    inputs, grad = inputs_and_grad(operation, (9, 33), BF16, generator)
    inputs[0][4] = 0
    assert not check(operation, inputs, grad)
    inputs[0][4, 3] = torch.nan
    with kernels_for("cpu"):
        value, grad_u, _ = value_and_gradients(OPERATIONS[operation][0], inputs, grad)
    broken = value.isnan()
    assert broken[4].all() if operation.startswith("normalized") else broken[4].sum() == 1
    assert grad_u[4, 3].isnan() and broken.sum() == broken[4].sum() and grad_u[:4].isfinite().all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_bf16_and_fp16_values_are_rounded_once(operation, generator):
    """Fails if any intermediate is narrower than fp32."""
    for dtype, rounding in ((BF16, 2**-8), (FP16, 2**-11)):
        inputs = make_inputs(operation, (31, 65), dtype, generator)
        function, plain = OPERATIONS[operation]
        with kernels_for("cpu"):
            actual = function(*inputs)
        truth = plain(*(x.double() for x in inputs))
        assert actual.dtype == dtype
        assert ((actual.double() - truth).abs() <= truth.abs() * rounding * 1.001 + 1e-7).all()


@pytest.mark.parametrize("operation", LAYOUTS)
def test_rows_with_strides_and_gradients_without(operation, generator):
    """Rows that lie within wider ones, columns that do not lie side by side, and the gradient of a sum, which is one number."""
    rest = [SIZES] if operation in ACTIVATIONS else []
    inputs = make_inputs(operation, (27, 24), BF16, generator, len(SIZES) * len(rest))
    grad = torch.randn(27, 24, generator=generator).to(BF16)
    wide = torch.cat((inputs[0], inputs[0]), 1)
    views = (wide[:, inputs[0].size(1) :], inputs[0].t().contiguous().t())
    for view, its_grad in zip(views, (grad, torch.cat((grad, grad), 1)[:, :24]), strict=True):
        assert not check(operation, [view, *inputs[1:]], its_grad, *rest)
    assert not check(operation, inputs, torch.ones((), dtype=BF16).expand(27, 24), *rest)


@pytest.mark.parametrize("operation", LAYOUTS)
def test_two_runs_give_the_same_bits_and_leave_the_inputs(operation, generator):
    rest = [[7, 0, 4]] if operation in ACTIVATIONS else []
    shape = (11, 24)
    inputs, grad = make_inputs(operation, shape, BF16, generator, 3 * len(rest)), torch.randn(shape, generator=generator).to(BF16)
    copies = [x.clone() for x in inputs]
    with kernels_for("cpu"):
        runs = [value_and_gradients(OPERATIONS[operation][0], inputs, grad, *rest) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("operation", LAYOUTS)
def test_no_rows(operation, generator):
    rest = [[0, 0]] if operation in ACTIVATIONS else []
    shape = (0, 8)
    inputs = make_inputs(operation, shape, BF16, generator, 2 * len(rest))
    with kernels_for("cpu"):
        value, grad_x, *others = value_and_gradients(OPERATIONS[operation][0], inputs, torch.zeros(shape), *rest)
    assert value.shape == shape and grad_x.shape == inputs[0].shape and all(grad.eq(0).all() for grad in others)


@pytest.mark.parametrize("operation", ["squared_relu", "swiglu"])
def test_strips_of_rows_that_are_wider_than_a_program(operation, generator, monkeypatch):
    monkeypatch.setattr(activation, "MAX_WIDTH", 64)
    monkeypatch.setattr(activation, "_STRIP", 16)
    for rest in ([], [[4, 0, 5]]):
        inputs, grad = make_inputs(operation, (9, 71), BF16, generator, 3 * len(rest)), torch.randn(9, 71, generator=generator).to(BF16)
        assert not check(operation, inputs, grad, *rest)


def test_fp64_other_dimensions_and_other_scales_stay_eager(generator, monkeypatch):
    for module in (normalize, scale, activation):
        for name in [name for name in vars(module) if name.endswith(("forward", "backward"))]:
            monkeypatch.setattr(module, name, lambda *args, name=name: pytest.fail(name))
    x = torch.randn(4, 3, 8, generator=generator)
    with kernels_for("cpu"):
        l2_normalize(x.double())
        l2_normalize(x, dim=0)
        OPERATIONS["lerp_retract"][0](x, x, torch.ones(8, dtype=torch.float64))
        OPERATIONS["scale_features"][0](x.double(), torch.ones(8, dtype=torch.float64))
        OPERATIONS["squared_relu"][0](x.double(), torch.ones(8, dtype=torch.float64))


class TwoRanks:
    """Stands for a process group; `dist.all_reduce` is replaced by adding what the other rank would bring."""

    def size(self) -> int:
        return 2


def test_features_split_between_two_ranks(generator, monkeypatch):
    """Of different widths; one row is zero on one rank and one on both."""
    x, grad = (torch.randn(5, 3, 11, generator=generator) for _ in range(2))
    x[0, 0, :4], x[1, 1] = 0, 0
    truth = value_and_gradients(plain_l2, [x.double()], grad.double())
    square, radial = (x.double() ** 2), grad.double() * truth[0]
    for mine, others in ((slice(0, 4), slice(4, 11)), (slice(4, 11), slice(0, 4))):
        results = []
        for devices in (["cpu"], []):
            messages = [square[..., others].sum(-1, keepdim=True), radial[..., others].sum(-1, keepdim=True)]
            monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums, group, messages=messages: sums.add_(messages.pop(0)))
            with kernels_for(*devices):
                results.append(value_and_gradients(lambda shard: l2_normalize(shard, group=TwoRanks()), [x[..., mine]], grad[..., mine]))
            assert not messages
        assert not problems(["value", "gradient"], *results, [t[..., mine] for t in truth])


@pytest.mark.parametrize("operation", ["normalized squared_relu", "normalized swiglu"])
def test_activations_split_between_two_ranks(operation, generator, monkeypatch):
    """Of different widths; one row is zero on one rank and one on both."""
    row, width = TABLE[ACTIVATIONS[operation]], 11
    halves = row.gate_and_up
    (u, scale), grad = make_inputs(operation, (5, 3, width), FP32, generator), torch.randn(5, 3, width, generator=generator)
    u.unflatten(-1, (halves, -1))[0, 0, :, :4], u[1, 1] = 0, 0
    truth = value_and_gradients(OPERATIONS[operation][1], [u.double(), scale.double()], grad.double())
    square = OPERATIONS[operation.removeprefix("normalized ")][1](u.double(), scale.double()) ** 2
    radial = grad.double() * truth[0]
    for mine, others in ((slice(0, 4), slice(4, width)), (slice(4, width), slice(0, 4))):

        def part(x: Tensor, mine: slice = mine) -> Tensor:
            return x.unflatten(-1, (halves, -1))[..., mine].flatten(-2)

        def shard(u: Tensor, scale: Tensor) -> Tensor:
            form = dict(function=row.function, gated=row.gated, normalize=True)
            return scaled_activation(u, scale, FACTOR, **form, group=TwoRanks())

        results = []
        for devices in (["cpu"], []):
            messages = [square[..., others].sum(-1, keepdim=True), radial[..., others].sum(-1, keepdim=True)]
            monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums, group, messages=messages: sums.add_(messages.pop(0)))
            with kernels_for(*devices):
                results.append(value_and_gradients(shard, [part(u), part(scale)], grad[..., mine]))
            assert not messages
        assert not problems(["value", "gradient", "of the scale"], *results, [truth[0][..., mine], *map(part, truth[1:])])
