"""Sizes and options of Mamba and expert layers: refused with path, value, rule and a way out that works; their linear layers."""

import pytest

from ngpt.config import ConfigError, compose
from ngpt.config.linears import block_linears, recipe_by_linear
from ngpt.config.precision import check_features
from tests.unit.config.refusals import Bad, check

HYBRID = "model=ngpt_hybrid_tiny"
TWO, FOUR = "cluster.gpus_per_node=2", "cluster.gpus_per_node=4"
BAD = {
    "too_many_selected": Bad([HYBRID, "model.moe_top_k=5"], "model.moe_top_k", "5", "num_experts 4", ["model.moe_top_k=4"]),
    "experts_over_ranks": Bad(
        [HYBRID, "parallel.expert=4", FOUR, "model.num_experts=6"], "model.num_experts", "6", "parallel.expert 4", ["model.num_experts=8"]
    ),
    "expert_width_over_ranks": Bad(
        [HYBRID, "parallel=tp2", TWO, "model.moe_ffn_hidden_size=49"],
        "model.moe_ffn_hidden_size",
        "49",
        "parallel.expert_tensor 2",
        ["model.moe_ffn_hidden_size=50"],
    ),
    "shared_width_over_ranks": Bad(
        [HYBRID, "parallel=tp2", TWO, "model.moe_shared_ffn_hidden_size=97"],
        "model.moe_shared_ffn_hidden_size",
        "97",
        "parallel.tensor 2",
        ["model.moe_shared_ffn_hidden_size=98"],
    ),
    "bias_of_softmax": Bad(
        [HYBRID, "model.moe_score=softmax"], "model.moe_expert_bias", "True", "sigmoid scores only", ["model.moe_expert_bias=false"]
    ),
    "unread_coefficient": Bad(
        [HYBRID, "model.moe_aux_loss=none"], "model.moe_aux_loss_coeff", "0.01", "not read", ["model.moe_aux_loss_coeff=0"]
    ),
    "useless_loss": Bad(
        [HYBRID, "model.moe_aux_loss_coeff=0"], "model.moe_aux_loss_coeff", "0.0", "do nothing", ["model.moe_aux_loss=none"]
    ),
    "score": Bad([HYBRID, "model.moe_score=relu"], "model.moe_score", "relu", "sigmoid, softmax", ["model.moe_score=sigmoid"]),
    "suv_over_ranks": Bad(
        [HYBRID, "model.moe_suv=shared", "parallel.expert_tensor=2", TWO],
        "parallel.expert_tensor",
        "2",
        "parallel.tensor 1",
        ["parallel.expert_tensor=1"],
    ),
    "grouped_in_odd_widths": Bad(
        [HYBRID, "model.expert_impl=grouped", "model.moe_ffn_hidden_size=72", "parallel.tensor=2", "parallel.expert_tensor=2", TWO],
        "model.expert_impl",
        "grouped",
        "model.moe_ffn_hidden_size are 36 on a rank",
        ["model.expert_impl=auto"],
    ),
    "grouped_under_amaxes": Bad(
        [HYBRID, "model.expert_impl=grouped", "precision=nvfp4_nvidia"],
        "model.expert_impl",
        "grouped",
        "weight dynamic amax",
        ["model.expert_impl=auto"],
    ),
    "grouped_with_one_dynamic_gradient": Bad(
        [HYBRID, "model.expert_impl=grouped", "precision=nvfp4_paper", "precision.grad_output_amax=dynamic"],
        "model.expert_impl",
        "grouped",
        "grad_output dynamic amax",
        ["precision.grad_output_amax=dynamic_pow2"],
    ),
    "grouped_with_square_gradients": Bad(
        [HYBRID, "model.expert_impl=grouped", "precision=nvfp4_paper", "precision.operands.grad_output.blocks=16x16"],
        "model.expert_impl",
        "grouped",
        "grad_output dynamic_pow2 amax, 16x16",
        ["precision.operands.grad_output.amax=static"],
    ),
    "no_sequence_parallel": Bad(
        [HYBRID, "parallel=tp2", TWO, "parallel.sequence_parallel=false"],
        "parallel.sequence_parallel",
        "False",
        "trains experts",
        ["parallel.sequence_parallel=null"],
    ),
    "overlap_of_nothing": Bad(
        [HYBRID, "parallel.shared_expert_overlap=true", "model.moe_shared_ffn_hidden_size=0"],
        "parallel.shared_expert_overlap",
        "True",
        "no shared expert",
        ["parallel.shared_expert_overlap=false"],
    ),
    "overlap_dispatcher": Bad(
        [HYBRID, "parallel.shared_expert_overlap=true", "parallel.token_dispatcher=allgather"],
        "parallel.shared_expert_overlap",
        "True",
        "alltoall dispatcher",
        ["parallel.token_dispatcher=alltoall"],
    ),
    "overlap_recomputed": Bad(
        [HYBRID, "parallel.shared_expert_overlap=true", "parallel.recompute=selective", "parallel.recompute_modules=[shared_experts]"],
        "parallel.shared_expert_overlap",
        "True",
        "cannot recompute",
        ["parallel.recompute_modules=[moe]"],
    ),
    "dispatcher": Bad(
        [HYBRID, "parallel.token_dispatcher=flex"], "parallel.token_dispatcher", "flex", "DeepEP", ["parallel.token_dispatcher=alltoall"]
    ),
    "stage_without_experts": Bad(
        [HYBRID, "parallel=pp2", TWO, "model.layer_pattern='M|E*E-'"],
        "model.layer_pattern",
        "M|E*E-",
        "rank 0 gets no E layer",
        ["model.layer_pattern='ME|*E-'"],
    ),
    "chunks_without_experts": Bad(
        [HYBRID, "parallel=pp2_vp2", TWO, "model.layer_pattern='M|E|*|E-'"],
        "model.layer_pattern",
        "M|E|*|E-",
        "rank 0 gets no E layer",
        ["model.layer_pattern='M|E|E*|-'"],
    ),
    "blank": Bad([HYBRID, "model.layer_pattern='ME* E'"], "model.layer_pattern", "ME* E", "symbol ' '", ["model.layer_pattern='ME*E-'"]),
    "nothing": Bad([HYBRID, "model.layer_pattern=''"], "model.layer_pattern", "''", "no layers", ["model.layer_pattern='ME*E-'"]),
    "cut_for_one_stage": Bad(
        [HYBRID, "model.layer_pattern='ME|*E-'"],
        "model.layer_pattern",
        "ME|*E-",
        "1 stages",
        ["model.layer_pattern='ME*E-'"],
        "Drop every |",
    ),
    "more_stages_than_layers": Bad(
        [HYBRID, "model.layer_pattern='ME*E-'", "parallel.pipeline=8", "cluster.gpus_per_node=8", "train.global_batch_size=16"],
        "model.layer_pattern",
        "ME*E-",
        "is not cut into parallel.pipeline 8",
        ["parallel.pipeline=1"],
    ),
    "expert_tensor_over_processes": Bad(
        [HYBRID, "parallel.expert_tensor=4", TWO],
        "cluster.gpus_per_node",
        "2 processes",
        "expert_tensor 4",
        ["parallel.expert_tensor=2"],
        "or lower parallel.expert_tensor",
    ),
    "processes": Bad([HYBRID, "parallel=ep2"], "cluster.gpus_per_node", "1 processes", "expert 2 * expert_tensor 1", [TWO]),
    "recompute_without_experts": Bad(
        ["parallel.recompute=selective", "parallel.recompute_modules=[moe]"],
        "parallel.recompute_modules",
        "moe",
        "no E layer",
        ["parallel.recompute_modules=[mlp]"],
    ),
    "overlap_in_a_dense_model": Bad(
        ["parallel.shared_expert_overlap=true"],
        "parallel.shared_expert_overlap",
        "True",
        "a dense model has none",
        ["parallel.shared_expert_overlap=false"],
    ),
    "heads_over_groups": Bad(
        [HYBRID, "model.mamba_num_heads=5"], "model.mamba_num_heads", "5", "mamba_num_groups 2", ["model.mamba_num_heads=6"]
    ),
    "groups_over_tensor": Bad(
        [HYBRID, "parallel=tp2", TWO, "model.mamba_num_groups=1"],
        "model.mamba_num_groups",
        "1",
        "parallel.tensor 2",
        ["model.mamba_num_groups=2"],
    ),
    "heads_over_context": Bad(
        [HYBRID, "parallel=cp2", TWO, "model.mamba_num_heads=7", "model.mamba_num_groups=1"],
        "model.mamba_num_heads",
        "7",
        "* context 2",
        ["model.mamba_num_heads=8"],
    ),
    "groups_over_context": Bad(
        [HYBRID, "parallel=cp2", TWO, "model.mamba_num_heads=12", "model.mamba_num_groups=3"],
        "model.mamba_num_groups",
        "3",
        "parallel.context 2",
        ["model.mamba_num_groups=2"],
    ),
    "kernel": Bad([HYBRID, "model.mamba_conv_kernel=5"], "model.mamba_conv_kernel", "5", "2, 3, 4", ["model.mamba_conv_kernel=4"]),
    "documents": Bad(
        [HYBRID, "data.confine_attention=true"], "data.confine_attention", "True", "carry their state", ["data.confine_attention=false"]
    ),
    "features_of_in_proj": Bad(
        [HYBRID, "precision=nvfp4_paper", "model.mamba_num_heads=8"],
        "model.mamba_num_heads",
        "8 * 9 + 64 = 136 features leave layers.0.mixer.in_proj",
        "multiple of 16",
        ["model.mamba_num_heads=16"],
    ),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_hybrid_is_refused_with_a_way_out_that_works(bad: Bad):
    check(bad)


def test_hybrid_patterns_are_cut_by_hand():
    with pytest.raises(ConfigError, match="Mark the cuts"):
        compose(["experiment=ngpt_hybrid_tiny", "parallel=pp2", TWO])
    compose(["experiment=ngpt_hybrid_tiny", "parallel=pp2", TWO, "model.layer_pattern='ME|*E-'"])


@pytest.mark.parametrize(("layout", "parts"), [("pp2", 2), ("pp2_vp2", 4)])
def test_a_wrong_number_of_cuts_is_one_error_whose_way_out_works(layout, parts):
    """A hybrid is not cut by itself, so dropping the cuts would not help."""
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=ngpt_hybrid_tiny", f"parallel={layout}", TWO, "model.layer_pattern='ME|*|E-'"])
    assert caught.value.path == "model.layer_pattern" and caught.value.way_out == f"Write {parts} parts"


def test_too_few_processes_for_the_model_are_named_once():
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=ngpt_hybrid_tiny", "parallel=tp2"])
    assert caught.value.rule.startswith("Must be a multiple of tensor 2")


@pytest.mark.parametrize("precision", ["bf16", "nvfp4_paper", "nvfp4_static", "fp8"])
def test_grouped_experts_may_be_asked_for(precision):
    compose(["experiment=ngpt_hybrid_tiny", "model.expert_impl=grouped", f"precision={precision}", "cluster.gpu=h100"])


@pytest.mark.parametrize("precision", ["nvfp4_paper", "nvfp4_nvidia", "mxfp8"])
def test_grouped_experts_may_be_asked_for_under_every_native_recipe(precision):
    widths = ["model.moe_ffn_hidden_size=64"]
    compose(["experiment=ngpt_hybrid_tiny", "model.expert_impl=grouped", f"precision={precision}", "cluster.gpu=b200", *widths])


def test_linears_of_every_kind_of_layer_on_one_rank():
    overrides = ["parallel=tp2", TWO, "parallel.expert_tensor=1", "model.activation=swiglu"]
    linears = block_linears(compose(["experiment=ngpt_hybrid_tiny", *overrides]))
    assert [(linear.name, linear.in_features, linear.out_features) for linear in linears] == [
        ("layers.0.mixer.in_proj", 64, 176),  # (z 128, x 128, B 32, C 32, dt 32) / 2
        ("layers.0.mixer.out_proj", 64, 64),
        ("layers.1.mlp.experts.linear_fc1", 64, 96),
        ("layers.1.mlp.experts.linear_fc2", 48, 64),
        ("layers.1.mlp.shared_experts.linear_fc1", 64, 96),
        ("layers.1.mlp.shared_experts.linear_fc2", 48, 64),
        ("layers.2.self_attention.linear_qkv", 64, 64),
        ("layers.2.self_attention.linear_proj", 32, 64),
        ("layers.3.mlp.experts.linear_fc1", 64, 96),
        ("layers.3.mlp.experts.linear_fc2", 48, 64),
        ("layers.3.mlp.shared_experts.linear_fc1", 64, 96),
        ("layers.3.mlp.shared_experts.linear_fc2", 48, 64),
        ("layers.4.mlp.linear_fc1", 64, 160),
        ("layers.4.mlp.linear_fc2", 80, 64),
    ]


def test_all_linears_of_a_hybrid_take_static_scales():
    cfg = compose(["experiment=ngpt_hybrid_tiny", "precision=nvfp4_paper"])
    assert len(recipe_by_linear(cfg)) == len(block_linears(cfg)) == 14
    assert not list(check_features(cfg))
