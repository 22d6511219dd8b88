"""Multi-token prediction in the layer pattern: refused with path, value, rule and a way out that works; its linear layers."""

import pytest

from ngpt.config import compose
from ngpt.config.identity import model_defining
from ngpt.config.linears import block_linears, recipe_by_linear
from ngpt.config.pattern import cut_pattern, parse
from tests.unit.config.refusals import Bad, check

PATTERN, KEY = "model.layer_pattern=", "model.layer_pattern"
DEPTH = PATTERN + "'*-*-/*-'"
TWO = "cluster.gpus_per_node=2"
HYBRID = "model=ngpt_hybrid_tiny"
BAD = {
    "unequal": Bad([PATTERN + "'*-*-/*-/-*'"], KEY, "*-*-/*-/-*", "*- differs from -*", [PATTERN + "'*-*-/*-/*-'"], "*-/*-"),
    "empty": Bad([PATTERN + "'*-*-/'"], KEY, "*-*-/", "none follow", [PATTERN + "'*-*-'"]),
    "empty_second": Bad([PATTERN + "'*-*-/*-/'"], KEY, "*-*-/*-/", "none follow", [PATTERN + "'*-*-/*-'"]),
    "no_trunk": Bad([PATTERN + "'/*-'"], KEY, "/*-", "no layers before", [DEPTH]),
    "cut_in_a_depth": Bad([PATTERN + "'*-*-/*|-'"], KEY, "*-*-/*|-", "last pipeline stage", [DEPTH], "Drop every |"),
    "symbol_in_a_depth": Bad([PATTERN + "'*-*-/*G'"], KEY, "*-*-/*G", "Unknown symbol G", [DEPTH]),
    "length": Bad([DEPTH, "model.num_layers=3"], KEY, "*-*-/*-", "2 layers before its first /", ["model.num_layers=2"], "num_layers=2"),
    "uncut": Bad(
        [PATTERN + "'**--/*-'", "model.num_layers=4", "parallel=pp2", TWO], KEY, "**--/*-", "not cut", [PATTERN + "'**|--/*-'"]
    ),
    "cuts": Bad(
        [PATTERN + "'*|-|*-/*-'", "parallel=pp2", TWO], KEY, "*|-|*-/*-", "2 stages", [PATTERN + "'*-|*-/*-'"]
    ),
    "layers_over_pipeline": Bad(
        [PATTERN + "'*-*-*-/*-'", "model.num_layers=3", "parallel=pp2", TWO],
        "parallel.pipeline",
        "2",
        "3 layers",
        ["parallel.pipeline=1"],
    ),
    "experts_of_the_depth_alone": Bad([PATTERN + "'*-*-/*E'"], "model.num_experts", "0", "has E layers", ["model.num_experts=4"]),
    "experts_on_one_stage": Bad(
        [HYBRID, PATTERN + "'*-*-/*E'", "model.num_layers=2", "parallel=pp2", TWO],
        KEY,
        "*-*-/*E",
        "rank 0 gets no E layer",
        [PATTERN + "'*E|*-/*E'", "model.num_layers=4"],
    ),
    "coefficient": Bad([DEPTH, "model.mtp_loss_coeff=0"], "model.mtp_loss_coeff", "0", "positive", ["model.mtp_loss_coeff=0.3"]),
    "documents": Bad(
        [DEPTH, "data.confine_attention=true"], "data.confine_attention", "True", "another document's", ["data.confine_attention=false"]
    ),
    "recomputed_groups": Bad(
        [DEPTH, "parallel.recompute=full", "parallel.recompute_num_layers=2"],
        "parallel.recompute_num_layers",
        "2",
        "groups of one layer",
        ["parallel.recompute_num_layers=1"],
    ),
    "megatron_depths": Bad(
        [DEPTH, "+megatron.mtp_num_layers=1"], "megatron.mtp_num_layers", "1", "model.layer_pattern sets", []
    ),
    "megatron_repeated": Bad(
        [DEPTH, "+megatron.mtp_use_repeated_layer=true"], "megatron.mtp_use_repeated_layer", "True", "weights of its own", []
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_prediction_is_refused_with_a_way_out_that_works(bad: Bad):
    check(bad)


@pytest.mark.parametrize(
    ("pattern", "stages", "cut"),
    [
        ("*-*-/*-/*-", 1, "*-*-/*-/*-"),
        ("*-*-/*-/*-", 2, "*-|*-/*-/*-"),
        ("*-*-*-*-/-", 4, "*-|*-|*-|*-/-"),
        ("*|-*-/*-", 2, "*|-*-/*-"),
        ("*-*-", 2, "*-|*-"),
    ],
)
def test_pipeline_cuts_go_into_the_layers_of_the_model(pattern: str, stages: int, cut: str):
    assert cut_pattern(pattern, stages) == cut
    assert parse(cut).trunk == parse(pattern).trunk and parse(cut).depths == parse(pattern).depths


def test_linears_of_a_depth_are_named_after_it_and_come_last():
    names = [linear.name for linear in block_linears(compose(["experiment=ngpt_hybrid_tiny", PATTERN + "'ME*E-/*M/*M'"]))]
    layers = ["0.self_attention.linear_qkv", "0.self_attention.linear_proj", "1.mixer.in_proj", "1.mixer.out_proj"]
    assert names[14:] == [f"mtp.{depth}.layers.{layer}" for depth in (0, 1) for layer in layers]
    assert names[:14] == [linear.name for linear in block_linears(compose(["experiment=ngpt_hybrid_tiny"]))]


def test_recipes_quantise_depths_unless_their_modules_are_named():
    base = ["experiment=ngpt_tiny", "precision=nvfp4_paper", DEPTH]

    def in_depths(*overrides: str) -> list[str]:
        return [name for name in recipe_by_linear(compose([*base, *overrides])) if name.startswith("mtp.")]

    assert len(in_depths()) == len(in_depths("precision.num_layers_at_end_in_bf16=1")) == 4
    assert in_depths("precision.bf16_modules=['mtp.*']") == []
    assert in_depths("precision.bf16_modules=['mtp.*.layers.*.mlp.linear_fc2']") == [
        "mtp.0.layers.0.self_attention.linear_qkv", "mtp.0.layers.0.self_attention.linear_proj", "mtp.0.layers.1.mlp.linear_fc1"
    ]  # fmt: skip


def test_depths_and_their_coefficient_make_another_model():
    plain, deep = (model_defining(compose(["experiment=ngpt_tiny", *overrides])) for overrides in ([], [DEPTH]))
    assert plain != deep and "model.mtp_loss_coeff" in deep and "model.mtp_loss_coeff" not in plain
    cut = model_defining(compose(["experiment=ngpt_tiny", PATTERN + "'*-|*-/*-'", "parallel=pp2", TWO]))
    assert cut == deep
