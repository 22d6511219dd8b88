"""Recipes for Transformer Engine where it is missing: what is refused, and how its kernels are called, against a stand-in for them.

The stand-in keeps what matters of Transformer Engine 2.20.2: results hold the amax tensors they were given, `clear` empties them,
`quantize_` asks the result's own quantiser, and the kernels accept one class only. It quantises with the reference. The real thing is
tested in tests/gpu.
"""

import dataclasses
import importlib
import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_ext.precision.te_recipes import Nvfp4Factory, te_recipe, unavailable
from ngpt.precision import FourOverSix, QuantizerSpec, quantize
from ngpt.recipes import Recipe, SpecByDirection

STATIC = QuantizerSpec(global_amax="static")
WEIGHT = QuantizerSpec(block_shape=(16, 16), global_amax="static")
POW2_SR = QuantizerSpec(global_amax="dynamic_pow2", rounding="sr")
RHT = QuantizerSpec(rht="signed")


def nvfp4(**changes) -> Recipe:
    recipe = Recipe("paper", "bf16", "nvfp4", STATIC, WEIGHT, POW2_SR)
    return dataclasses.replace(recipe, **changes)


class FakeQuantizer:
    def __init__(self, *, rowwise: bool, columnwise: bool):
        self.rowwise_usage, self.columnwise_usage, self.internal, self.optimize_for_gemm = rowwise, columnwise, False, False

    def set_usage(self, *, rowwise=None, columnwise=None):
        self.rowwise_usage = self.rowwise_usage if rowwise is None else rowwise
        self.columnwise_usage = self.columnwise_usage if columnwise is None else columnwise


class FakeNvfp4Quantizer(FakeQuantizer):
    def __init__(self, *, rowwise, columnwise, **options):
        super().__init__(rowwise=rowwise, columnwise=columnwise)
        self.options = options

    def update_quantized(self, src, dst, *, noop_flag=None):
        for amax in (dst._amax_rowwise, dst._amax_columnwise):
            amax.copy_(src.abs().amax())


class FakeNvfp4Tensor:
    def __init__(self, x, quantizer, amax_rowwise, amax_columnwise):
        shape = (16, 16) if quantizer.options["with_2d_quantization"] else (1, 16)
        self._quantizer, self.internal, self.swizzled = quantizer, quantizer.internal, quantizer.optimize_for_gemm
        for direction, used, amax in (
            ("rowwise", quantizer.rowwise_usage, amax_rowwise),
            ("columnwise", quantizer.columnwise_usage, amax_columnwise),
        ):
            spec = QuantizerSpec(global_amax="static", static_amax=amax.item(), block_shape=shape)
            setattr(self, f"_{direction}_data", quantize(x, spec, direction).codes if used else None)
            setattr(self, f"_amax_{direction}", amax if used else None)

    def quantize_(self, x):
        self._quantizer.update_quantized(x, self)

    def copy_from_storage(self, other):
        assert self.swizzled == other.swizzled
        for name in ("_rowwise_data", "_columnwise_data", "_amax_rowwise", "_amax_columnwise"):
            if getattr(self, name) is not None:
                getattr(self, name).copy_(getattr(other, name))

    def clear(self):
        for amax in (self._amax_rowwise, self._amax_columnwise):
            amax.data = torch.empty(0)


def quantize_with_amax(x, quantizer, amax_rowwise, amax_columnwise):
    assert type(quantizer) is FakeNvfp4Quantizer
    assert all(amax.shape == (1,) and amax.dtype == torch.float32 for amax in (amax_rowwise, amax_columnwise))
    return FakeNvfp4Tensor(x, quantizer, amax_rowwise, amax_columnwise)


@pytest.fixture
def te_nvfp4(monkeypatch) -> ModuleType:
    """megatron_ext.precision.te_nvfp4 over the stand-in."""
    identity = type(
        "IdentityQuantizer", (FakeQuantizer,), {"__init__": lambda self: FakeQuantizer.__init__(self, rowwise=True, columnwise=True)}
    )
    contents = {
        "transformer_engine": {},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {"CustomRecipe": object},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.cpp_extensions": {"nvfp4_quantize_with_amax": quantize_with_amax},
        "transformer_engine.pytorch.constants": {"DType": SimpleNamespace(kFloat4E2M1="e2m1")},
        "transformer_engine.pytorch.quantized_tensor": {"Quantizer": FakeQuantizer},
        "transformer_engine.pytorch.tensor": {},
        "transformer_engine.pytorch.tensor.identity_tensor": {"IdentityQuantizer": identity},
        "transformer_engine.pytorch.tensor.nvfp4_tensor": {"NVFP4Quantizer": FakeNvfp4Quantizer},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    name = "megatron_ext.precision.te_nvfp4"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    yield module
    del sys.modules[name]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


def role(tensor_type: str, module_type: str = "linear") -> SimpleNamespace:
    return SimpleNamespace(module_type=module_type, tensor_type=tensor_type, name="layers.0.mlp.linear_fc1")


def test_without_transformer_engine_a_format_is_unavailable_and_says_why():
    for format in ("fp8", "mxfp8", "nvfp4"):
        assert "transformer-engine" in unavailable(nvfp4(format=format)) or "CUDA" in unavailable(nvfp4(format=format))
    assert unavailable(nvfp4(format="none")) is None


def test_no_format_needs_no_recipe():
    with pytest.raises(ValueError, match="'none'.*fp8, mxfp8, nvfp4"):
        te_recipe(nvfp4(format="none"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": RHT, "grad_output": dataclasses.replace(RHT, global_amax="dynamic_pow2")}, "rht with global_amax=dynamic_pow2 of grad"),
        ({"input": dataclasses.replace(RHT, global_amax="static"), "grad_output": RHT}, "rht with global_amax=static of input"),
        ({"input": dataclasses.replace(RHT, block_shape=(16, 16)), "grad_output": RHT}, "rht with 16x16 blocks of input"),
        ({"weight": SpecByDirection(WEIGHT, STATIC)}, "directions that differ by more than the transform of weight"),
        ({"input": RHT, "grad_output": RHT, "dtype": "fp32"}, "rht with dtype fp32"),
        ({"grad_output": dataclasses.replace(WEIGHT, rounding="sr")}, "stochastic rounding with 16x16 blocks of grad_output"),
        ({"input": QuantizerSpec(row_scaled=True)}, "row_scaled of input"),
        ({"weight": QuantizerSpec(four_over_six=FourOverSix())}, "four_over_six of weight"),
    ],
)
def test_a_combination_beyond_transformer_engine_is_refused_by_name(changes, message):
    with pytest.raises(NotImplementedError, match=message):
        te_recipe(nvfp4(**changes))


def test_every_slot_gets_its_own_quantiser_of_its_role(te_nvfp4):
    factory = Nvfp4Factory(QuantizerSpec(rht="unsigned"), WEIGHT, POW2_SR)
    made = {name: factory(role(name, module)) for name in ("input", "weight", "grad_output") for module in ("linear", "grouped_linear")}
    assert made["input"].options == {
        "fp4_dtype": "e2m1",
        "with_amax_reduction": False,
        "amax_reduction_group": None,
        "with_rht": True,
        "with_post_rht_amax": True,
        "with_2d_quantization": False,
        "stochastic_rounding": False,
        "row_scaled_nvfp4": False,
        "nvfp4_use_4over6": False,
        "nvfp4_e4m3_max": 448,
        "nvfp4_4over6_err_mode": "MAE",
        "with_random_sign_mask": False,
    }
    changed = {"with_rht": False, "with_post_rht_amax": False, "with_random_sign_mask": True}
    assert made["weight"].kernels.options == made["input"].options | changed | {"with_2d_quantization": True}
    assert made["grad_output"].kernels.options == made["input"].options | changed | {"stochastic_rounding": True}
    assert made["weight"].custom and made["grad_output"].custom and not hasattr(made["weight"], "with_amax_reduction")
    assert factory(role("weight")) is not made["weight"] and factory(role("weight")).kernels is not made["weight"].kernels
    for other in (None, role("output"), role("grad_input"), role("qkv", "dpa"), role("input", "dpa")):
        assert type(factory(other)).__name__ == "IdentityQuantizer"


def test_a_checkpoint_can_pickle_the_factory():
    factory = Nvfp4Factory(STATIC, WEIGHT, POW2_SR)
    assert pickle.loads(pickle.dumps(factory)) == factory


@pytest.mark.parametrize("spec", [STATIC, WEIGHT, dataclasses.replace(STATIC, static_amax=2.625)])
def test_a_static_amax_outlives_updates_and_clearing(te_nvfp4, spec, x):
    quantizer = te_nvfp4.GivenAmaxQuantizer(spec)
    first, second = quantizer.quantize_impl(x), quantizer.quantize_impl(100 * x)
    first.quantize_(50 * x)
    second.clear()
    third = quantizer.quantize_impl(x)
    for result in (first, third):
        assert result._amax_rowwise.tolist() == result._amax_columnwise.tolist() == [spec.static_amax]
    assert len({tensor._amax_rowwise.data_ptr() for tensor in (first, third)} | {third._amax_columnwise.data_ptr()}) == 3
    for direction in ("rowwise", "columnwise"):
        assert torch.equal(getattr(first, f"_{direction}_data"), quantize(50 * x, spec, direction).codes)
        assert torch.equal(getattr(third, f"_{direction}_data"), quantize(x, spec, direction).codes)


@pytest.mark.parametrize("spec", [STATIC, WEIGHT, POW2_SR], ids=lambda spec: spec.global_amax)
def test_parts_are_quantised_as_each_alone(te_nvfp4, spec):
    sizes, generator = [32, 96, 32], torch.Generator().manual_seed(1)
    x = torch.randn(160, 64, generator=generator) * torch.tensor([1.0, 30.0, 1e-3]).repeat_interleave(torch.tensor(sizes))[:, None]
    quantizer = te_nvfp4.GivenAmaxQuantizer(spec)
    quantizer.internal = True
    together, alone = quantizer.quantize_parts(x, sizes), [quantizer.quantize_impl(part) for part in x.split(sizes)]
    for ours, wanted in zip(together, alone, strict=True):
        assert ours.internal and ours._amax_rowwise.shape == (1,)
        for name in ("_rowwise_data", "_columnwise_data", "_amax_rowwise", "_amax_columnwise"):
            assert torch.equal(getattr(ours, name), getattr(wanted, name))
    assert len({ours._amax_rowwise.item() for ours in together}) == (1 if spec.global_amax == "static" else 3)
    together[0].clear()
    assert together[1]._amax_rowwise.item() == alone[1]._amax_rowwise.item()


def test_a_part_that_is_not_finite_leaves_the_others_their_amax(te_nvfp4, monkeypatch):
    monkeypatch.setattr(te_nvfp4.tex, "nvfp4_quantize_with_amax", lambda part, kernels, row, column: row.item())
    x = torch.ones(96, 64)
    x[40, 3] = float("nan")
    first, second, third = te_nvfp4.GivenAmaxQuantizer(POW2_SR).quantize_parts(x, [32, 32, 32])
    assert first == third == 1.3125 and second != second


def test_an_update_fills_the_directions_that_are_there(te_nvfp4, x):
    quantizer = te_nvfp4.GivenAmaxQuantizer(STATIC, columnwise=False)
    quantizer.optimize_for_gemm = True
    result = quantizer.quantize_impl(x)
    quantizer.set_usage(rowwise=False, columnwise=True)
    quantizer.update_quantized(-x, result)
    assert torch.equal(result._rowwise_data, quantize(-x, STATIC).codes) and result._columnwise_data is None
    with pytest.raises(NotImplementedError, match="noop_flag.*CUDA graphs"):
        quantizer.update_quantized(x, result, noop_flag=torch.zeros(1))


def test_the_kernels_see_the_flags_that_linear_sets(te_nvfp4, x):
    quantizer = te_nvfp4.GivenAmaxQuantizer(STATIC)
    quantizer.set_usage(rowwise=False)
    quantizer.internal, quantizer.optimize_for_gemm = True, True
    for maker in (quantizer, quantizer.copy()):
        result = maker.quantize_impl(x)
        assert result._rowwise_data is None and result._columnwise_data is not None and result.internal and result.swizzled
    assert type(result._quantizer) is FakeNvfp4Quantizer
    assert quantizer.copy().kernels is not quantizer.kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1.3125, 2.625, 7e4, 0.0, float("nan"), float("inf")])
def test_a_dynamic_pow2_amax_is_the_reference_s(te_nvfp4, x, size, dtype):
    values = ((x / x.abs().max()) if size == size and size not in (0.0, float("inf")) else torch.zeros_like(x)).to(dtype) * size
    values[3, 5] = -size
    ours = te_nvfp4.GivenAmaxQuantizer(POW2_SR)._amax(values)
    reference = quantize(values, QuantizerSpec(global_amax="dynamic_pow2")).global_amax
    torch.testing.assert_close(ours, reference, rtol=0, atol=0, equal_nan=True)
    assert te_nvfp4.GivenAmaxQuantizer(POW2_SR)._amax(values[:0]).tolist() == [0.0]


def test_only_rounding_to_nearest_can_be_repeated(te_nvfp4):
    assert te_nvfp4.GivenAmaxQuantizer(STATIC).is_requantization_safe()
    assert not te_nvfp4.GivenAmaxQuantizer(POW2_SR).is_requantization_safe()
