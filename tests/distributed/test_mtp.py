"""Multi-token prediction: trained the same however the model is cut, recomputed, resumed and resharded; bounds as in test_layouts.py.

`mtp` has two depths, `mtp_gated` one and tied embeddings, `mtp_hybrid` two depths with a Mamba and an expert layer each.
"""

import pytest
from mtp_cases import ONE_PROCESS, TWO_PROCESSES

LOSS, GRAD_NORM = 4 * 2**-23, 8 * 2**-23  # relative, in units of fp32's last place: see test_layouts.py
BF16_ROUNDING = 4e-3
LAYOUTS = {
    case.name: f"one_{case.model}"
    for case in TWO_PROCESSES
    if case.seed and not case.name.startswith("reshard") and not case.name.endswith(("nvfp4", "bf16")) and "resume" not in case.name
}
DEPTHS = {"mtp": 2, "mtp_gated": 1, "mtp_control": 1, "mtp_hybrid": 2}
NGPT = [case.name for case in ONE_PROCESS + TWO_PROCESSES if case.model != "mtp_control" and not case.name.startswith(("seed", "resume"))]
# 4 of attention and MLP in a pair and in each depth, embedding and head, and a projection a depth; tied embeddings are one. In the
# hybrid 2 of attention and of each mixer, the stacked experts and a shared one of 2 each in every expert layer.
MATRICES = {"mtp": 4 * 4 + 2 + 2, "mtp_gated": 3 * 4 + 1 + 1, "mtp_hybrid": 2 + 3 * 2 + 4 * 4 + 2 + 2}
EMBEDDING, PROJECTION = "embedding.word_embeddings.weight", "mtp.layers.0.eh_proj.weight"


def prediction_losses(row: dict) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith("mtp_")}


@pytest.mark.parametrize(("layout", "reference"), LAYOUTS.items())
def test_losses_and_gradient_norms_equal_one_process(results, layout, reference):
    rows, wanted = results.rows(layout), results.rows(reference)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted] == [1, 2, 3, 4]
    for row, other in zip(rows, wanted, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=LOSS)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=GRAD_NORM)
        assert len(prediction_losses(other)) == DEPTHS[reference.removeprefix("one_")]
        assert prediction_losses(row) == pytest.approx(prediction_losses(other), rel=LOSS)
        if "val_loss" in other:
            assert row["val_loss"] == pytest.approx(other["val_loss"], rel=LOSS)


@pytest.mark.parametrize("layout", [name for name, reference in LAYOUTS.items() if reference == "one_mtp_hybrid"])
def test_router_loads_and_balancing_loss_count_the_experts_of_every_depth(results, layout):
    for row, wanted in zip(results.rows(layout), results.rows("one_mtp_hybrid"), strict=True):
        # The mean over two layers of the model and one of each depth; 1 where all experts are equally busy, and nearly so here.
        assert row["aux_loss"] == pytest.approx(wanted["aux_loss"], rel=1e-6) and 1 < row["aux_loss"] < 1.05
    row, wanted = results.rows(layout)[1], results.rows("one_mtp_hybrid")[1]
    loads = {key: value for key, value in wanted.items() if "expert_load" in key}
    assert len(loads) == 3 and {key: row[key] for key in loads} == pytest.approx(loads, rel=1e-9)


def test_full_recompute_changes_no_bit(results):
    keys = ("train_loss", "mtp_1_loss", "mtp_2_loss", "grad_norm")
    assert results.figures("recompute_mtp_hybrid", *keys) == results.figures("one_mtp_hybrid", *keys)


@pytest.mark.parametrize("name", NGPT)
def test_masters_and_model_weights_have_unit_norm(results, name):
    assert results.summary(name)["start_norm_deviation"] < 1e-6
    assert max(row.get("worst_norm_deviation", 0.0) for row in results.rows(name)) < 1e-6
    for result in results.results(name):
        assert result["model_norms"] and max(result["model_norms"].values()) < (BF16_ROUNDING if name.endswith("bf16") else 1e-6)
    assert f"0.module.{PROJECTION}" in results.results(name)[-1]["model_norms"] or "pp2" in name


@pytest.mark.parametrize("model", MATRICES)
def test_every_matrix_is_marked_once(results, model):
    assert len(results.results(f"one_{model}")[0]["built"]) == MATRICES[model]


@pytest.mark.parametrize("layout", ["tp2_mtp", "tp2_mtp_control", "tp2_mtp_hybrid"])
def test_tensor_parallel_ranks_keep_the_same_projection(results, layout):
    first, second = (result["weights"][f"0.{PROJECTION}"] for result in results.results(layout))
    assert first == second


@pytest.mark.parametrize("layout", ["pp2_mtp_gated", "pp2_mtp_hybrid", "vpp2_mtp", "pp2_mtp_gated_bf16"])
def test_both_copies_of_the_embedding_have_the_same_bits(results, layout):
    first, last = ({weight for name, weight in r["weights"].items() if name.endswith(EMBEDDING)} for r in results.results(layout))
    assert len(first) == 1 and first == last


def test_a_resumed_run_ends_with_the_same_bits(results):
    keys = ("train_loss", "mtp_1_loss", "grad_norm", "learning_rate")
    assert results.figures("resume_pp2_mtp_halves", *keys) == results.figures("pp2_mtp_gated_bf16", *keys)
    for halves, whole in zip(results.results("resume_pp2_mtp_halves"), results.results("pp2_mtp_gated_bf16"), strict=True):
        assert halves["weights"] and halves["weights"] == whole["weights"]


def test_resharded_resume_continues_the_same_run(results):
    rows, wanted = results.rows("reshard_mtp_tp2_to_pp2"), results.rows("one_mtp")[2:]
    assert [row["step"] for row in rows] == [3, 4]
    for row, other in zip(rows, wanted, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        assert prediction_losses(row) == pytest.approx(prediction_losses(other), rel=1e-6)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5)
        assert row["learning_rate"] == other["learning_rate"]


def test_quantised_depths_are_the_same_in_every_layout(results):
    row, wanted = results.rows("tp2_mtp_nvfp4")[0], results.rows("one_mtp_nvfp4")[0]
    assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=LOSS)
    assert prediction_losses(row) == pytest.approx(prediction_losses(wanted), rel=LOSS)
    assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    high = results.rows("one_mtp")[0]
    for key, loss in prediction_losses(wanted).items():
        assert loss != pytest.approx(high[key], rel=1e-6)
