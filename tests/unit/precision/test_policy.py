"""A recipe reaches every linear it names, or says so."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack
from torch import nn

from megatron_ext.precision.executors import EmulatedExecutor, GroupedExecutor, QuantizableColumn, QuantizableGrouped
from megatron_ext.precision.policy import apply_recipes, linears_of
from megatron_ext.precision.state import PrecisionState
from ngpt.config import Config, ConfigError, compose
from ngpt.config.linears import recipes_in_use
from ngpt.optim.retraction import mark
from ngpt.recipes import Recipe


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


def emulated(cfg: Config) -> dict[Recipe, str]:
    return dict.fromkeys(recipes_in_use(cfg), "emulated")


def apply(classes: dict[str, type], *overrides: str) -> HybridStack:
    cfg = compose(["experiment=ngpt_tiny", "precision=nvfp4_paper", *overrides])
    model = stack(classes)
    apply_recipes([model], cfg, emulated(cfg), PrecisionState(1, 0, 4))
    return model


def test_every_linear_of_this_rank_gets_an_executor():
    model = apply({"linear_qkv": Quantizable, "linear_proj": Quantizable})
    attention = model.layers[0].self_attention
    assert all(isinstance(linear.executor, EmulatedExecutor) for linear in attention.children())


def test_every_linear_rounds_from_a_stream_of_its_own():
    attention = apply({"linear_qkv": Quantizable, "linear_proj": Quantizable}).layers[0].self_attention
    seeds = [linear.executor.state.next_rounding_seed(linear.executor.index) for linear in attention.children()]
    alone = PrecisionState(1, 0, 4)
    assert seeds == [alone.next_rounding_seed(place) for place in (0, 1)]  # by their places in the whole model
    assert len(set(seeds)) == 2


def test_a_prediction_depth_is_named_after_its_depth_though_megatron_counts_its_layers_from_one():
    model, depth = nn.Module(), nn.Module()
    depth.mtp_model_layer, depth.eh_proj = stack({"linear_qkv": Quantizable}), Quantizable(tp_group=None)
    model.decoder, model.mtp = stack({"linear_qkv": Quantizable}), nn.Module()
    model.mtp.layers = nn.ModuleList([depth, depth])
    cfg = compose(["experiment=ngpt_tiny", "precision=nvfp4_paper", "model.layer_pattern='*-*-/*/*'", 'precision.bf16_modules=["*_proj"]'])
    assert apply_recipes([model], cfg, emulated(cfg), PrecisionState(1, 0, 4)) == 2
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


class GroupedLinear(nn.Module):
    """Two experts' weights, which may not be kept at unit norm; what the backend computes is ones."""

    def __init__(self, experts: int, marked: bool, pg_collection: object):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = nn.Parameter(nn.functional.normalize(torch.randn(experts * 32, 16, generator=generator), dim=-1))
        if marked:
            mark(self.weight, unit_dim=1, num_matrices=experts)

    def forward(self, x, sizes):
        return x.new_ones(x.size(0), 32), None


class QuantizableExperts(QuantizableGrouped, GroupedLinear):
    unit_norm_input = True


def experts(marked: bool = True) -> QuantizableExperts:
    return QuantizableExperts(2, marked, pg_collection=SimpleNamespace(expt_tp=None))


def grouped_stack(linear: nn.Module, *overrides: str, step: int = 1) -> nn.Module:
    others = 'precision.bf16_modules=["*.linear_fc2","*.shared_experts.*"]'
    cfg = compose(["experiment=ngpt_hybrid_tiny", "precision=nvfp4_paper", others, *overrides])
    experts, layer, found = nn.Module(), nn.Module(), HybridStack.__new__(HybridStack)
    nn.Module.__init__(found)
    experts.linear_fc1, layer.layer_number, layer.mlp = linear, 2, nn.Module()
    layer.mlp.experts, found.layers = experts, nn.ModuleList([layer])
    state = PrecisionState(1, 0, 4, cfg.precision.bf16_tail)
    assert apply_recipes([found], cfg, emulated(cfg), state) == 1
    state.begin_step(step)
    return linear


def test_the_linear_of_all_experts_is_quantised_under_the_name_that_each_alone_has():
    x = nn.functional.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(3)), dim=-1)
    linear = grouped_stack(experts())
    assert isinstance(linear.executor, GroupedExecutor) and linear.executor.name == "layers.1.mlp.experts.linear_fc1"
    first, second = linear.weight.chunk(2)
    wanted = torch.cat([x[:2] @ first.t(), x[2:] @ second.t()])
    y, bias = linear(x, [2, 3])
    assert bias is None and 0.01 < (y - wanted).norm() / wanted.norm() < 0.3


@pytest.mark.parametrize(("overrides", "step", "tokens"), [([], 1, 0), (["precision.bf16_tail=0.5"], 3, 5)], ids=["no_tokens", "bf16_tail"])
def test_experts_run_in_the_backend_without_tokens_and_in_the_tail(overrides, step, tokens):
    linear = grouped_stack(experts(), *overrides, step=step)
    assert torch.equal(linear(torch.ones(tokens, 16), [tokens, 0])[0], torch.ones(tokens, 32))


def test_experts_whose_weights_are_not_kept_at_unit_norm_are_refused_a_static_scale():
    with pytest.raises(ConfigError) as caught:
        grouped_stack(experts(marked=False))
    assert caught.value.path == "precision.weight_amax" and "layers.1.mlp.experts.linear_fc1" in caught.value.rule
