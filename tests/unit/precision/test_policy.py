"""A recipe reaches every linear it names, or says so."""

import pytest
from megatron.core.models.hybrid.hybrid_block import HybridStack
from torch import nn

from megatron_ext.precision.executors import EmulatedExecutor, QuantizableColumn
from megatron_ext.precision.policy import apply_recipe, linears_of
from megatron_ext.precision.state import PrecisionState
from ngpt.config import ConfigError, compose
from ngpt.optim.retraction import mark
from ngpt.precision.recipe import recipe_of


class Linear(nn.Module):
    def __init__(self, tp_group=None):
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(4, 4).weight.data)
        mark(self.weight, unit_dim=1)


class Quantizable(QuantizableColumn, Linear):
    unit_norm_input = True


def stack(classes: dict[str, type]) -> HybridStack:
    """The first layer of a model: an attention layer with the named linears."""
    layer, found = nn.Module(), HybridStack.__new__(HybridStack)
    nn.Module.__init__(found)
    layer.layer_number, layer.self_attention = 1, nn.Module()
    for name, kind in classes.items():
        setattr(layer.self_attention, name, kind(tp_group=None))
    found.layers = nn.ModuleList([layer])
    return found


def apply(classes: dict[str, type], *overrides: str) -> HybridStack:
    cfg = compose(["experiment=ngpt_tiny", "precision=nvfp4_paper", *overrides])
    model = stack(classes)
    apply_recipe([model], cfg, "emulated", PrecisionState(recipe_of(cfg.precision), 1, 0, 4))
    return model


def test_every_linear_of_this_rank_gets_an_executor():
    model = apply({"linear_qkv": Quantizable, "linear_proj": Quantizable})
    attention = model.layers[0].self_attention
    assert all(isinstance(linear.executor, EmulatedExecutor) for linear in attention.children())


def test_a_prediction_depth_is_named_after_its_depth_though_megatron_counts_its_layers_from_one():
    model, depth = nn.Module(), nn.Module()
    depth.mtp_model_layer, depth.eh_proj = stack({"linear_qkv": Quantizable}), Quantizable(tp_group=None)
    model.decoder, model.mtp = stack({"linear_qkv": Quantizable}), nn.Module()
    model.mtp.layers = nn.ModuleList([depth, depth])
    cfg = compose(["experiment=ngpt_tiny", "precision=nvfp4_paper", "model.layer_pattern='*-*-/*/*'", 'precision.bf16_modules=["*_proj"]'])
    assert apply_recipe([model], cfg, "emulated", PrecisionState(recipe_of(cfg.precision), 1, 0, 4)) == 2
    assert [name for name, _ in linears_of([model])] == ["layers.0.self_attention.linear_qkv", "mtp.0.layers.0.self_attention.linear_qkv"]
    assert depth.mtp_model_layer.layers[0].self_attention.linear_qkv.executor is not None
    assert depth.eh_proj.executor is None


def test_a_linear_that_cannot_be_quantised_is_not_passed_over():
    with pytest.raises(AssertionError, match="layers.0.self_attention.linear_proj"):
        apply({"linear_qkv": Quantizable, "linear_proj": Linear})


def test_a_linear_kept_in_bf16_need_not_be_quantisable():
    model = apply({"linear_qkv": Quantizable, "linear_proj": Linear}, 'precision.bf16_modules=["*.linear_proj"]')
    assert model.layers[0].self_attention.linear_qkv.executor is not None


def test_a_static_quantiser_is_refused_where_the_module_tree_has_no_unit_norm():
    class Unnormalised(Quantizable):
        unit_norm_input = False

    with pytest.raises(ConfigError) as caught:
        apply({"linear_qkv": Quantizable, "linear_proj": Unnormalised})
    assert caught.value.path == "precision.input_amax" and "layers.0.self_attention.linear_proj" in caught.value.rule
