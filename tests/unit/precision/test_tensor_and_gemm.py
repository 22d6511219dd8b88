"""`QuantizedTensor`: saving and equality. `qgemm`: against fp64 products of dequantised operands, and the refusals."""

import dataclasses

import pytest
import torch

from ngpt.precision import QuantizedTensor, QuantizerSpec, qgemm, quantize

SPEC = QuantizerSpec()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("direction", ["rowwise", "columnwise"])
@pytest.mark.parametrize("spec", [SPEC, QuantizerSpec(block_shape=(16, 16)), QuantizerSpec(rht="signed"), QuantizerSpec(row_scaled=True)])
def test_state_survives_saving(x, spec, direction, tmp_path):
    quantised = quantize(x, spec, direction)
    torch.save(quantised.to_tensors(), tmp_path / "state.pt")
    loaded = QuantizedTensor.from_tensors(torch.load(tmp_path / "state.pt", weights_only=True))
    assert loaded.same_as(quantised) and loaded.counters() == quantised.counters()
    assert torch.equal(loaded.dequantize(), quantised.dequantize())


def test_state_of_another_version_is_refused(x):
    state = quantize(x, SPEC).to_tensors()
    state["layout"][0] += 1
    with pytest.raises(ValueError, match="state version 2.*reads version 1"):
        QuantizedTensor.from_tensors(state)


def test_frozen(x):
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantize(x, SPEC).codes = None


def test_equality_forgives_what_the_golden_rules_forgive_and_nothing_else(x):
    x[0, 0, :16], x[0, 1, 0] = 1e-30, float("nan")
    x[0, 2, :16] = torch.tensor([4.0] + [0.0] * 15)
    static = QuantizerSpec(global_amax="static")
    quantised = quantize(x, static)

    def changed(name: str, row: int, column: int, value: int) -> QuantizedTensor:
        tensor = getattr(quantised, name).clone()
        tensor[row, column] = value
        return dataclasses.replace(quantised, **{name: tensor})

    assert quantised.same_as(quantize(x.clone(), static))
    assert quantised.same_as(changed("codes", 0, 0, 0x12))  # under scale 0
    assert quantised.same_as(changed("codes", 2, 1, 0x88))  # -0
    assert quantised.same_as(changed("block_decode_scale", 1, 0, 0xFF))  # NaN
    assert not quantised.same_as(changed("codes", 2, 1, 0x01))
    assert not quantised.same_as(changed("block_decode_scale", 2, 0, 3))
    assert not quantised.same_as(dataclasses.replace(quantised, global_amax=quantised.global_amax * 2))
    assert not quantised.same_as(dataclasses.replace(quantised, shape=(64, 64)))
    assert not quantised.same_as(quantize(x, static, "columnwise"))


@pytest.mark.parametrize("factor", ["kernel", "division"])
def test_the_three_gemms_of_a_linear_layer(x, factor):
    """y = x w^T, dx = dy w, dw = dy^T x with quantised operands, in fp64 from their dequantised values."""
    generator = torch.Generator().manual_seed(4)
    x = x.view(64, 64)
    w, dy = torch.randn(96, 64, generator=generator), torch.randn(64, 96, generator=generator)
    square = QuantizerSpec(block_shape=(16, 16))
    rows = {name: quantize(value, spec) for name, value, spec in (("x", x, SPEC), ("w", w, square), ("dy", dy, SPEC))}
    columns = {name: quantize(value, spec, "columnwise") for name, value, spec in (("x", x, SPEC), ("w", w, square), ("dy", dy, SPEC))}
    for a, b in ((rows["x"], rows["w"]), (rows["dy"], columns["w"]), (columns["dy"], columns["x"])):
        exact = a.dequantize().double() @ b.dequantize().double().t()
        bound = 4e-7 * (a.dequantize().double().abs() @ b.dequantize().double().abs().t())
        assert ((qgemm(a, b, factor=factor).double() - exact).abs() <= bound).all()
    assert qgemm(rows["x"], rows["w"]).shape == (64, 96)
    assert ((qgemm(rows["x"], rows["w"]) - x @ w.t()).norm() / (x @ w.t()).norm()) < 0.2


def test_the_transforms_of_both_operands_cancel(x):
    x = x.view(64, 64).bfloat16()
    rotated, plain = (quantize(x, QuantizerSpec(rht=rht), "columnwise") for rht in ("signed", "off"))
    exact = x.double().t() @ x.double()
    for operand in (rotated, plain):
        assert (qgemm(operand, operand).double() - exact).norm() / exact.norm() < 0.1
    with pytest.raises(ValueError, match="'signed' and 'off'.*same one"):
        qgemm(rotated, plain)


def test_a_row_scaled_operand_scales_its_rows_or_columns(x):
    scaled, plain = quantize(x, QuantizerSpec(row_scaled=True)), quantize(x, SPEC)
    exact = scaled.dequantize().double() @ plain.dequantize().double().t()
    torch.testing.assert_close(qgemm(scaled, plain).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(qgemm(plain, scaled).double(), exact.t(), rtol=1e-5, atol=1e-5)


def test_a_power_of_two_scale_makes_a_plain_bf16_product_the_nvfp4_product(x):
    spec = QuantizerSpec(global_amax="dynamic_pow2")
    a = quantize(x, spec)
    values = a.dequantize(torch.bfloat16)
    assert torch.equal(qgemm(a, a, torch.bfloat16), (values.double() @ values.double().t()).float().bfloat16())


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((32, 48), (32, 48), "reduction over 48.*multiple of 32.*Pad to 64"),
        ((32, 32), (32, 64), "reduction over 32 and 64.*same second dimension"),
        ((32, 32), (4, 32), "4 rows of the second operand.*multiple of 8.*Pad to 8"),
    ],
)
def test_bad_operands_are_refused_with_the_rule_and_the_way_out(a, b, message):
    with pytest.raises(ValueError, match=message):
        qgemm(quantize(torch.zeros(a), SPEC), quantize(torch.zeros(b), SPEC))


def test_an_unknown_formula_is_refused(x):
    with pytest.raises(ValueError, match="'fast' is not"):
        qgemm(quantize(x, SPEC), quantize(x, SPEC), factor="fast")
