"""Models with Mamba and experts: trained the same however they are cut, recomputed, resumed and resharded.

The seed checkpoints have randomised scales; bounds as in test_layouts.py. `hybrid_gated` has one suv for all experts and halves to shard.
"""

import pytest
from cases import HYBRID_MODELS
from hybrid_cases import FOUR_PROCESSES, ONE_PROCESS, TWO_PROCESSES

LOSS, GRAD_NORM = 2e-7, 1e-6  # relative, fp32
BF16_LOSS, BF16_GRAD_NORM, BF16_ROUNDING = 2e-4, 1e-2, 4e-3
LAYOUTS = {
    **{f"{layout}_{model}": f"one_{model}" for layout in ("tp2", "ep2") for model in HYBRID_MODELS},
    "pp2_hybrid": "one_hybrid",
    "cp2_hybrid": "one_hybrid",
    "cp2_hybrid_gated": "one_hybrid_gated",
    "dp2_hybrid": "one_hybrid",
    "dp2_hybrid_overlap": "one_hybrid",
    "tp2_hybrid_whole_experts": "one_hybrid",
    "tp2_hybrid_gated_whole_experts": "one_hybrid_gated",
    "one_hybrid_overlap": "one_hybrid",
    "recompute_hybrid_experts": "one_hybrid",  # gradients of a checkpointed module are added in another order
    "tp2_ep2_hybrid": "one_hybrid",
    "tp2_ep2_hybrid_gated": "one_hybrid_gated",
}
RESHARDED = ["one_to_tp2", "one_to_pp2", "one_to_ep2", "ep2_to_tp2"]
NGPT = [case.name for case in ONE_PROCESS + TWO_PROCESSES + FOUR_PROCESSES
        if case.model != "hybrid_control" and not case.name.startswith(("seed", "resume"))]  # fmt: skip
# Mamba and attention 2 each, routers aside 4 experts and a shared one of 2 each in 2 layers, embedding and head; the gated model's routers.
MATRICES = {"hybrid": 2 + 2 + 2 * (4 * 2 + 2) + 2, "hybrid_gated": 2 + 2 + 2 * (4 * 2 + 2) + 2 + 2}


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


@pytest.mark.parametrize(("one", "other"), [("recompute_hybrid", "one_hybrid"), ("dp2_hybrid_overlap", "dp2_hybrid")])
def test_switches_that_compute_nothing_else_change_no_bit(results, one, other):
    keys = ("train_loss", "grad_norm")
    assert results.figures(one, *keys) == results.figures(other, *keys)


def test_bf16_over_expert_parallel_ranks_stays_within_rounding(results):
    for row, wanted in zip(results.rows("ep2_hybrid_bf16"), results.rows("one_hybrid_bf16"), strict=True):
        assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=BF16_LOSS)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=BF16_GRAD_NORM)


@pytest.mark.parametrize("name", NGPT)
def test_masters_and_model_weights_have_unit_norm(results, name):
    assert results.summary(name)["start_norm_deviation"] < 1e-6
    assert max(row.get("worst_norm_deviation", 0.0) for row in results.rows(name)) < 1e-6
    for result in results.results(name):
        assert result["model_norms"] and max(result["model_norms"].values()) < (BF16_ROUNDING if "bf16" in name else 1e-6)


@pytest.mark.parametrize("model", MATRICES)
def test_every_matrix_is_marked_once(results, model):
    assert len(results.results(f"one_{model}")[0]["built"]) == MATRICES[model]
    assert results.results("one_hybrid_control")[0]["built"] == {}


def test_a_run_resumed_over_expert_parallel_ranks_ends_with_the_same_bits(results):
    keys = ("train_loss", "grad_norm", "learning_rate", "aux_loss")
    assert results.figures("resume_ep2_halves", *keys) == results.figures("resume_ep2_whole", *keys)
    for halves, whole in zip(results.results("resume_ep2_halves"), results.results("resume_ep2_whole"), strict=True):
        assert halves["weights"] and halves["weights"] == whole["weights"]


def test_every_rank_resumes_with_its_own_random_numbers(results):
    first, second = results.results("resume_ep2_halves")
    assert [first["rng"], second["rng"]] == [result["rng"] for result in results.results("resume_ep2_whole")]
    assert first["rng"]["expert-parallel-rng"] != second["rng"]["expert-parallel-rng"]


@pytest.mark.parametrize("change", RESHARDED)
def test_resharded_resume_continues_the_same_run(results, change):
    rows, wanted = results.rows(f"reshard_hybrid_{change}"), results.rows("reshard_whole_one_hybrid")[2:]
    assert [row["step"] for row in rows] == [3, 4]
    for row, other in zip(rows, wanted, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5)
        assert row["learning_rate"] == other["learning_rate"]


@pytest.mark.parametrize("layout", ["tp2_hybrid_nvfp4", "ep2_hybrid_nvfp4"])
def test_quantised_experts_and_mixers_are_the_same_in_every_layout(results, layout):
    """The first step: from the second on, a value that rounds another way sends tokens to other experts."""
    row, wanted = results.rows(layout)[0], results.rows("one_hybrid_nvfp4")[0]
    assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=LOSS)
    assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    assert row["train_loss"] != pytest.approx(results.rows("one_hybrid")[0]["train_loss"], rel=1e-6)
