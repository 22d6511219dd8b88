"""The probes of `ngpt doctor` pass on sound arithmetic and fail on each kind of broken one."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_ext.precision import linear, probe, probe_native
from ngpt.findings import FAILED, OK, UNAVAILABLE
from ngpt.precision import qgemm, quantize
from ngpt.precision.formats import encode_e2m1

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
FORMATS = {path.stem: yaml.safe_load(path.read_text()).get("format") for path in (ROOT / "conf/precision").glob("*.yaml")}
PAPER = probe.shipped_recipe("nvfp4_paper")
NVIDIA = probe.shipped_recipe("nvfp4_nvidia")
FORWARD = {"input": PAPER.input, "weight": PAPER.weight}
GRADIENT = {"grad_output": PAPER.grad_output}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    set_sizes(monkeypatch, 64, 64, 128)


def set_sizes(monkeypatch, *sizes: int):
    for name, size in zip("MKN", sizes, strict=True):
        monkeypatch.setattr(probe, name, size)


def changed(operand, values):
    return operand and dataclasses.replace(operand, values=values)


def spoiled_emulate(spoil):
    """`emulate` whose operands' values go through `spoil(values, spec)`."""

    def broken(x, spec, **options):
        return tuple(changed(operand, spoil(operand.values, spec)) if operand else None for operand in probe_emulate(x, spec, **options))

    return broken


probe_emulate = probe.emulate


def one_element_off(values, _spec):
    values = values.clone()
    values[-1, -1] += 2.0**-9
    return values


def zeros_under_sr(values, spec):
    return torch.zeros_like(values) if spec.rounding == "sr" else values


def test_everything_passes_on_the_cpu():
    findings = list(probe.probe_emulated(CPU))
    assert [finding for finding in findings if finding.status != OK] == []
    assert len({(finding.subject, finding.what) for finding in findings}) == len(findings)
    probed = {finding.what for finding in findings}
    assert {f"{what}, {name}" for what in ("quantise", "three products") for name in probe.shipped_recipes("nvfp4")} < probed


def test_one_wrong_code_of_a_packed_tensor_is_seen(monkeypatch):
    packed = probe.quantize_packed

    def broken(x, spec, **options):
        row, column = packed(x, spec, **options)
        row.codes[5, 3] ^= 0x10
        return row, column

    monkeypatch.setattr(probe, "quantize_packed", broken)
    assert probe.same_bits(FORWARD, CPU) == (False, "differ: packed input rowwise, packed weight rowwise")


def test_one_wrong_value_of_an_operand_is_seen(monkeypatch):
    monkeypatch.setattr(probe, "emulate", spoiled_emulate(one_element_off))
    passed, figure = probe.same_bits(FORWARD, CPU)
    assert not passed
    assert "1 values of input rowwise, 1 values of input columnwise" in figure


def test_rounding_to_nearest_is_no_stochastic_rounding(monkeypatch):
    def nearest(x, spec, *, seed=None):
        return probe_emulate(x, dataclasses.replace(spec, rounding="rtne"))

    monkeypatch.setattr(probe, "emulate", nearest)
    assert not probe.same_bits(GRADIENT, CPU)[0]
    assert not probe.rounding_mean(PAPER.grad_output, CPU)[0]


def test_a_small_bias_of_stochastic_rounding_is_seen(monkeypatch):
    """Random numbers of 8 bits round towards zero by 1/512 of a step more often than they should."""
    set_sizes(monkeypatch, 256, 64, 384)
    assert probe.rounding_mean(PAPER.grad_output, CPU)[0]

    def eight_bits(x, spec, *, seed):
        random_bytes = torch.randint(256, x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        row = quantize(x, spec, random_bytes=random_bytes)
        column = quantize(x, spec, "columnwise", random_bytes=random_bytes.t().contiguous())
        stored = ((row, row.decode()), (column, column.decode().t()))
        return tuple(probe.Operand(values, q.global_amax, q.e4m3_bound) for q, values in stored)

    monkeypatch.setattr(probe, "emulate", eight_bits)
    assert not probe.rounding_mean(PAPER.grad_output, CPU)[0]


def test_gradients_of_all_zeros_are_seen(monkeypatch):
    monkeypatch.setattr(linear, "emulate", spoiled_emulate(zeros_under_sr))
    assert probe.live_gradients(PAPER, CPU) == (
        False,
        "dx 0.0% nonzero, vanishes, the same result for another seed; dw 0.0% nonzero, vanishes, the same result for another seed",
    )
    assert not probe.three_products(PAPER, CPU)[0]


def test_gradients_that_are_not_finite_are_seen(monkeypatch):
    monkeypatch.setattr(linear, "emulate", spoiled_emulate(lambda values, spec: values / 0.0 if spec.rounding == "sr" else values))
    passed, figure = probe.live_gradients(PAPER, CPU)
    assert not passed
    assert "not finite" in figure


def test_rounding_that_ignores_its_seed_or_does_not_repeat_is_seen(monkeypatch):
    monkeypatch.setattr(linear, "emulate", lambda x, spec, **options: probe_emulate(x, spec, **options | {"seed": 1}))
    assert probe.live_gradients(PAPER, CPU)[1].count("the same result for another seed") == 2
    seeds = iter(range(100))
    monkeypatch.setattr(linear, "emulate", lambda x, spec, **options: probe_emulate(x, spec, **options | {"seed": next(seeds)}))
    assert probe.live_gradients(PAPER, CPU)[1].count("another result for the same seed") == 2


@pytest.mark.parametrize("recipe", [PAPER, NVIDIA], ids=["paper", "nvidia"])
@pytest.mark.parametrize("function", ["multiply", "_weight_gradient"])
def test_one_wrong_element_of_a_product_is_seen(monkeypatch, recipe, function):
    right = getattr(linear, function)

    def broken(*arguments):
        result = right(*arguments)
        (result if function == "multiply" else arguments[3])[7, 9] *= 1.01
        return result

    assert probe.three_products(recipe, CPU)[0]
    monkeypatch.setattr(linear, function, broken)
    assert not probe.three_products(recipe, CPU)[0]


def test_a_forgotten_global_scale_is_seen(monkeypatch):
    monkeypatch.setattr(linear, "factor_of_operands", lambda a, b: None)
    assert not probe.three_products(NVIDIA, CPU)[0]


def test_another_rule_for_ties_is_not_the_known_answer(monkeypatch):
    assert probe.known_answer()[0]
    module = sys.modules[quantize.__module__]
    monkeypatch.setattr(module, "encode_e2m1", lambda values: encode_e2m1(values * (1 + 2.0**-20)))
    passed, figure = probe.known_answer()
    assert not passed
    assert f"expected {probe.KNOWN_DIGEST}" in figure


def test_a_kernel_that_raises_fails_its_probe_and_no_other(monkeypatch):
    def raises(*_arguments, **_options):
        raise RuntimeError("\nno kernel image is available\nfor execution on the device")

    monkeypatch.setattr(probe, "quantize_packed", raises)
    statuses = {finding.what: finding for finding in probe.probe_emulated(CPU)}
    assert statuses["quantise, nvfp4_paper"].status == FAILED
    assert statuses["quantise, nvfp4_paper"].figure == "RuntimeError: no kernel image is available"
    assert statuses["three products, nvfp4_paper"].status == OK


@pytest.fixture
def native(monkeypatch):
    """Transformer Engine's part computed by the reference, with gradients that `native.spoil` may change."""

    class Stand:
        @staticmethod
        def spoil(tensor):
            return tensor

    def linear_results(recipe):
        if recipe.format != "nvfp4":  # as fp8 would: 3 bits of mantissa
            x, w, dy = (tensor.to(torch.float8_e4m3fn).float() for tensor in scaled(probe.operands()))
            return x @ w.t(), Stand.spoil(dy @ w * 2.0**-16), Stand.spoil(dy.t() @ x * 2.0**-16)
        y, dx, dw = (qgemm(a, b, torch.bfloat16) for _, a, b in probe.reference_operands(recipe, probe.operands()))
        return y, Stand.spoil(dx), Stand.spoil(dw.float())

    def scaled(given):
        return given["input"].float(), given["weight"].float(), given["grad_output"].float() * 2.0**16

    draws = iter(range(10**6))

    def round_trip(x, spec):
        return Stand.spoil(quantize(x, spec, seed=next(draws) if spec.rounding == "sr" else None).dequantize())

    monkeypatch.setattr(probe_native, "linear_results", linear_results)
    monkeypatch.setattr(probe_native, "round_trip", round_trip)
    monkeypatch.setattr(probe_native, "unavailable", lambda recipe: None)
    return Stand


def test_sound_native_kernels_pass(native):
    findings = list(probe_native.probe_native())
    assert [finding for finding in findings if finding.status != OK] == []
    assert {finding.subject for finding in findings} == {"fp8", "mxfp8", "nvfp4 native"}
    for name in probe.shipped_recipes("nvfp4"):
        assert {f"quantise, {name}", f"three products, {name}"} <= {finding.what for finding in findings}


def test_every_recipe_of_conf_is_probed():
    inherited = {name for name, of in FORMATS.items() if of is None}  # their file starts from another recipe
    named = {name for name, of in FORMATS.items() if of == "nvfp4"}
    assert set(probe.shipped_recipes("fp8", "mxfp8", "nvfp4")) >= {name for name, of in FORMATS.items() if of not in (None, "none")}
    assert {"nvfp4_nvidia", "nvfp4_paper"} <= set(probe.shipped_recipes("nvfp4")) <= inherited | named


def test_a_product_that_is_right_for_its_operands_and_wrong_for_the_tensors_is_seen(monkeypatch):
    """A scale that is forgotten in the stored amax and in the product alike."""
    quantize, emulate = probe.quantize, linear.emulate

    def smaller(quantized):
        return quantized and dataclasses.replace(quantized, global_amax=quantized.global_amax * 0.7)

    monkeypatch.setattr(probe, "quantize", lambda *arguments, **options: smaller(quantize(*arguments, **options)))
    monkeypatch.setattr(linear, "emulate", lambda *arguments, **options: tuple(map(smaller, emulate(*arguments, **options))))
    passed, figure = probe.three_products(probe.shipped_recipe("nvfp4_nvidia"), CPU)
    assert not passed and "of the product that is not quantised" in figure and "and its rounding" not in figure


@pytest.mark.parametrize(
    "spoil",
    [torch.zeros_like, lambda tensor: tensor * 1.2, lambda tensor: tensor * float("nan"), lambda tensor: tensor.flip(0)],
    ids=["zeros", "scaled", "nan", "reordered"],
)
def test_native_kernels_that_give_wrong_gradients_fail(native, spoil):
    native.spoil = staticmethod(spoil)
    failed = {(finding.subject, finding.what) for finding in probe_native.probe_native() if finding.status == FAILED}
    expected = {("fp8", "three products"), ("mxfp8", "three products")}
    for name, recipe in probe.shipped_recipes("nvfp4").items():
        expected |= {("nvfp4 native", f"{what}, {name}") for what in ("quantise", "three products")}
        if recipe.grad_output.rounding == "sr":
            expected.add(("nvfp4 native", f"stochastic rounding, mean, {name}"))
    assert failed >= expected


def test_native_gradients_of_all_zeros_are_seen(native):
    native.spoil = staticmethod(torch.zeros_like)
    assert probe_native.live_gradients(PAPER) == (False, "dx 0.0% finite and nonzero, dw 0.0% finite and nonzero")


def test_what_the_hardware_lacks_is_unavailable_for_its_own_reason(monkeypatch):
    monkeypatch.setattr(probe_native, "unavailable", lambda recipe: f"no {recipe.format} below sm_100")
    assert [(finding.subject, finding.status, finding.figure) for finding in probe_native.probe_native()] == [
        ("fp8", UNAVAILABLE, "no fp8 below sm_100"),
        ("mxfp8", UNAVAILABLE, "no mxfp8 below sm_100"),
        ("nvfp4 native", UNAVAILABLE, "no nvfp4 below sm_100"),  # one line for all its recipes
    ]
