"""Models with Mamba and experts: trained the same however they are cut, recomputed, resumed and resharded.

The seed checkpoints have randomised scales; bounds as in test_layouts.py. `hybrid_gated` has one suv for all experts and halves to shard;
`deep` is hybrid_gated with six layers of every kind.
"""

import math

import pytest
from cases import BASE, HYBRID_MODELS, NVFP4, NVIDIA, STATIC
from hybrid_cases import DEEP, FOUR_PROCESSES, ONE_PROCESS, TWO_PROCESSES

from ngpt.config import compose
from ngpt.config.linears import recipe_by_linear

LOSS, GRAD_NORM = 4 * 2**-23, 8 * 2**-23  # relative, in units of fp32's last place: see test_layouts.py
BF16_LOSS, BF16_GRAD_NORM, BF16_ROUNDING = 2e-4, 1e-2, 4e-3
LAYOUTS = {
    **{f"{layout}_{model}": f"one_{model}" for layout in ("tp2", "ep2") for model in HYBRID_MODELS},
    "cp2_hybrid": "one_hybrid",
    "dp2_hybrid": "one_hybrid",
    "dp2_hybrid_overlap": "one_hybrid",
    "tp2_hybrid_gated_whole_experts": "one_hybrid_gated",
    **{f"one_{model}_sequential": f"one_{model}" for model in HYBRID_MODELS},
    "tp2_ep2_hybrid": "one_hybrid",
    "tp2_ep2_hybrid_gated": "one_hybrid_gated",
    **{f"{layout}_deep": "one_deep" for layout in ("vpp2", "cp2_ep2", "tp2_pp2", "vpp2_ep2")},
    "ep2_starved": "one_starved",
}
# Pairs in which the same numbers are computed in the same order.
BITWISE = [
    ("recompute_hybrid", "one_hybrid"),
    ("recompute_hybrid_experts", "one_hybrid"),
    ("recompute_hybrid_shared_experts", "one_hybrid"),
    ("recompute_deep", "one_deep"),
    ("dp2_hybrid_overlap", "dp2_hybrid"),
]
RECIPES = {"nvfp4": NVFP4, "nvidia": NVIDIA, "static": STATIC}
PROBED = ["one_deep", "vpp2_deep", "cp2_ep2_deep", "tp2_pp2_deep"]
# Every layout is saved from and loaded into once, and so are experts one by one and stacked: what a checkpoint holds depends on neither.
RESHARDED = ["one_to_tp2", "tp2_to_pp2", "pp2_to_ep2", "ep2_to_dp2"]
NGPT = [case.name for case in ONE_PROCESS + TWO_PROCESSES + FOUR_PROCESSES
        if not case.model.endswith("control") and not case.name.startswith(("seed", "resume"))]  # fmt: skip
# Mamba and attention 2 each, in 2 layers routers aside the stacked experts and a shared one of 2 each, embedding and head; the gated
# model's routers.
MATRICES = {"hybrid": 2 + 2 + 2 * (2 + 2) + 2, "hybrid_gated": 2 + 2 + 2 * (2 + 2) + 2 + 2}


@pytest.mark.parametrize(("layout", "reference"), LAYOUTS.items())
def test_losses_and_gradient_norms_equal_one_process(results, layout, reference):
    rows, wanted = results.figures(layout, "train_loss", "grad_norm"), results.figures(reference, "train_loss", "grad_norm")
    assert [row[0] for row in rows] == [row[0] for row in wanted] == [1, 2, 3, 4]
    for (_, loss, norm), (_, wanted_loss, wanted_norm) in zip(rows, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=LOSS)
        assert norm == pytest.approx(wanted_norm, rel=GRAD_NORM)


@pytest.mark.parametrize(("layout", "reference"), LAYOUTS.items())
def test_router_load_and_balancing_loss_equal_one_process(results, layout, reference):
    for row, wanted in zip(results.rows(layout), results.rows(reference), strict=True):
        assert row["aux_loss"] == pytest.approx(wanted["aux_loss"], rel=1e-6) and row["aux_loss"] > 1
    row, wanted = results.rows(layout)[1], results.rows(reference)[1]
    loads = {key: value for key, value in wanted.items() if "expert_load" in key}
    assert len(loads) == 3 and loads["health/expert_load/max"] > 1
    assert {key: row[key] for key in loads} == pytest.approx(loads, rel=1e-9)


def test_health_panel_knows_the_scales_of_every_layer(results):
    panels = {key.split("/")[1] for key in results.rows("one_hybrid")[1] if key.startswith("health/")}
    scales = {"attn_alpha", "mlp_alpha", "mixer_alpha", "sqk", "suv", "mixer_in_scale", "sz"}
    assert panels == scales | {"hidden_norm", "expert_load"}


@pytest.mark.parametrize(("one", "other"), BITWISE)
def test_switches_that_compute_nothing_else_change_no_bit(results, one, other):
    keys = ("train_loss", "grad_norm", "aux_loss")
    assert results.figures(one, *keys) == results.figures(other, *keys)
    for result, wanted in zip(results.results(one), results.results(other), strict=True):
        assert result["weights"] and result["weights"] == wanted["weights"]


@pytest.mark.parametrize("layout", PROBED)
def test_tokens_reach_each_other_through_attention_and_mamba_only(results, layout):
    """What a layer does not have, MLP or attention, is an identity: it must not pick up the first token (see layer_probe.py)."""
    results.rows(layout)
    probes = [probe for result in results.results(layout) for probe in result["token_0"]]
    assert {(probe["layer"], probe["kind"]) for probe in probes} == set(enumerate("ME*E-M", start=1))
    for probe in probes:
        assert probe["own"] > 0.1 and probe["leaked"] < 1e-6, probe
        assert probe["moved"] > 0.1 if probe["kind"] in "M*" else probe["moved"] < 1e-6, probe


@pytest.mark.parametrize("layout", PROBED)
def test_every_operand_of_a_static_quantiser_has_unit_norm(results, layout):
    """What static scaling relies on, measured at each linear that the recipe quantises, experts and mixers included."""
    results.rows(layout)
    cfg = compose([*BASE, *HYBRID_MODELS["hybrid_gated"], *DEEP, "precision=nvfp4_static"])
    norms = [item for result in results.results(layout) for item in result["operands"].items()]
    assert {name for name, _ in norms} == set(recipe_by_linear(cfg))
    assert all(deviation < 1e-6 for _, both in norms for deviation in both), norms


@pytest.mark.parametrize("run", ["one_starved", "ep2_starved", "ep2_starved_nvfp4"])
def test_experts_without_tokens_keep_training_healthy(results, run):
    """Half of the experts of each layer get none, with expert parallelism all those of the second rank; norms are tested below."""
    rows = results.rows(run)
    assert len(rows) == 4 and all(math.isfinite(row["grad_norm"]) and math.isfinite(row["train_loss"]) for row in rows)
    loads = [row[f"health/expert_load/{figure}"] for row in rows[1::2] for figure in ("min", "max")]
    assert loads == [2.0] * 4  # the busiest of 4 experts has twice the average of both: each token goes to the same two


def test_bf16_over_expert_parallel_ranks_stays_within_rounding(results):
    for row, wanted in zip(results.rows("ep2_hybrid_bf16"), results.rows("one_hybrid_bf16"), strict=True):
        assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=BF16_LOSS)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=BF16_GRAD_NORM)


@pytest.mark.parametrize("name", NGPT)
def test_masters_and_model_weights_have_unit_norm(results, name):
    assert results.summary(name)["start_norm_deviation"] < 1e-6
    assert max(row.get("worst_norm_deviation", 0.0) for row in results.rows(name)) < 1e-6
    for result in results.results(name):
        bound = BF16_ROUNDING if "bf16" in name else 1e-6
        assert result["model_norms"] and all(deviation < bound for deviation in result["model_norms"].values())


@pytest.mark.parametrize("model", MATRICES)
def test_every_matrix_is_marked_once(results, model):
    assert len(results.results(f"one_{model}")[0]["built"]) == MATRICES[model]
    assert results.results("one_hybrid_control")[0]["built"] == {}


def test_a_run_resumed_over_expert_parallel_ranks_ends_with_the_same_bits(results):
    keys = ("train_loss", "grad_norm", "learning_rate", "aux_loss")
    assert results.figures("resume_ep2_halves", *keys) == results.figures("ep2_hybrid_bf16", *keys)
    for halves, whole in zip(results.results("resume_ep2_halves"), results.results("ep2_hybrid_bf16"), strict=True):
        assert halves["weights"] and halves["weights"] == whole["weights"]


def test_every_rank_resumes_with_its_own_random_numbers(results):
    first, second = results.results("resume_ep2_halves")
    assert [first["rng"], second["rng"]] == [result["rng"] for result in results.results("ep2_hybrid_bf16")]
    assert first["rng"]["expert-parallel-rng"] != second["rng"]["expert-parallel-rng"]


@pytest.mark.parametrize("change", RESHARDED)
def test_resharded_resume_continues_the_same_run(results, change):
    rows, wanted = results.rows(f"reshard_hybrid_{change}"), results.rows("one_hybrid_gated")[2:]
    assert [row["step"] for row in rows] == [3, 4]
    for row, other in zip(rows, wanted, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5)
        assert row["learning_rate"] == other["learning_rate"]


@pytest.mark.parametrize("layout", ["tp2_hybrid_nvfp4", "ep2_hybrid_nvfp4", "cp2_hybrid_nvfp4", "tp2_deep_nvfp4", "ep2_deep_nvfp4"])
def test_quantised_experts_and_mixers_are_the_same_in_every_layout(results, layout):
    """The first step: from the second on, a value that rounds another way sends tokens to other experts."""
    model = layout.split("_")[1]
    row, wanted = results.rows(layout)[0], results.rows(f"one_{model}_nvfp4")[0]
    assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=LOSS)
    assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    assert row["train_loss"] != pytest.approx(results.rows(f"one_{model}")[0]["train_loss"], rel=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_quantises_every_linear_of_the_blocks_and_nothing_else(results, recipe):
    row, high = results.rows(f"one_deep_{recipe}")[0], results.rows("one_deep")[0]["train_loss"]
    cfg = compose([*BASE, *HYBRID_MODELS["hybrid_gated"], *DEEP, *RECIPES[recipe]])
    names = {name.split("/")[1] for name in row if name.startswith("precision/")}
    assert names == set(recipe_by_linear(cfg)) and len(names) > 10
    for name in names:
        errors = [row[f"precision/{name}/{operand}/relative_error"] for operand in ("input", "weight", "grad_output")]
        assert all(0.05 < error < 0.2 for error in errors), (name, errors)
    assert 1e-6 < abs(row["train_loss"] / high - 1) < 2e-2


def test_nvidias_pattern_trains_with_all_but_the_first_and_last_blocks_quantised(results):
    """Of the 17 layers of `M-M-M-M*-M-M-M-M-` those behind the first 2 and before the last 8, each of two linears."""
    rows = results.rows("nvidia_control")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0.9 * math.log(257) < row["train_loss"] < 1.3 * math.log(257) for row in rows)  # random tokens teach nothing
    seen = [name.split("/")[1] for row in rows for name in row if name.startswith("precision/")]
    assert {int(name.split(".")[1]) for name in seen} == set(range(2, 9))
    assert len(set(seen)) == 14


def test_filling_up_tokens_of_experts_one_by_one_changes_no_bit(results):
    """Of stacked ones tests/unit/precision/test_grouped_linear.py says the same."""
    results.rows("ep2_deep_nvfp4")
    for result in results.results("ep2_deep_nvfp4"):
        assert len(result["padding"]) == 2  # expert layers
        for layer in result["padding"]:
            as_trained, further = layer["filled"]
            assert 0 < as_trained < further and len(layer["changes"]) > 2 and not any(layer["changes"])


def test_a_pipeline_cut_changes_no_bit_of_quantised_training(results):
    assert results.figures("pp2_hybrid_nvfp4", "train_loss") == results.figures("one_hybrid_nvfp4", "train_loss")
