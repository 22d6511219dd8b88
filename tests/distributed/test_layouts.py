"""Training is the same however it is cut: losses, gradient norms and unit norms against one process, from one seed checkpoint.

The seed checkpoints have randomised scales, so that a wrong shard of a scale shows. Bounds: a loss is a mean of fp32 numbers, each the
result of sums whose order depends on layout and CPU; each of both may end two units in the last place from the true one. A gradient
norm goes through the model twice. BF16 rounds activations to 8 bits.
"""

from itertools import pairwise

import pytest
from cases import MODELS

LOSS, GRAD_NORM = 4 * 2**-23, 8 * 2**-23  # relative, in units of fp32's last place
BF16_LOSS, BF16_GRAD_NORM = 2e-4, 1e-2
FP32_LAYOUTS = [
    *((f"{layout}_{model}", f"one_{model}") for layout in ("tp2", "pp2") for model in MODELS),
    *((f"dp2_{model}", f"one_{model}") for model in ("plain", "gated")),
    *((f"cp2_{model}", f"one_{model}") for model in ("plain", "control")),
    ("vpp2_plain", "one_plain"),
    ("vpp2_gated", "one_gated"),
    ("tp2_no_sequence_parallel", "one_plain"),
    ("tp2_confined", "one_confined"),
    ("vpp2_confined", "one_confined"),
    ("dp2_overlap", "one_plain"),
    ("dp2_padded", "one_plain"),
    ("dp2_whole_masters", "one_plain"),
    ("dp2_fp32_from_rounded", "fp32_from_rounded"),
    ("tp2_pp2_plain", "one_plain"),
]
BF16_LAYOUTS = ["dp2_bf16", "dp2_bf16_overlap", "tp2_bf16", "tp2_dp2_bf16_overlap"]
# Pairs in which the same numbers are computed in the same order.
BITWISE = [
    ("recompute_full", "one_plain"),
    ("recompute_full_block", "one_plain"),
    ("recompute_core_attn", "one_plain"),
    ("recompute_mlp", "one_plain"),
    ("dp2_overlap", "dp2_plain"),
    ("one_allowed", "one_plain"),
    ("dp2_bf16_overlap", "dp2_bf16"),
]
# Here only the reported gradient norm sums in another order.
BITWISE_LOSS = [
    ("pp2_plain", "one_plain"),
    ("vpp2_plain", "pp2_plain"),
    ("vpp2_gated", "pp2_gated"),
    ("tp2_pp2_plain", "tp2_plain"),
    ("dp2_allowed", "dp2_overlap"),
]


@pytest.mark.parametrize(("layout", "reference"), FP32_LAYOUTS)
def test_losses_and_gradient_norms_equal_one_process(results, layout, reference):
    rows, wanted = results.figures(layout, "train_loss", "grad_norm"), results.figures(reference, "train_loss", "grad_norm")
    assert [row[0] for row in rows] == [row[0] for row in wanted] == [1, 2, 3, 4]
    for (_, loss, norm), (_, wanted_loss, wanted_norm) in zip(rows, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=LOSS)
        assert norm == pytest.approx(wanted_norm, rel=GRAD_NORM)


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_bf16_layouts_stay_within_rounding_of_one_process(results, layout):
    for row, wanted in zip(results.rows(layout), results.rows("one_bf16"), strict=True):
        assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=BF16_LOSS)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=BF16_GRAD_NORM)


@pytest.mark.parametrize(("one", "other"), BITWISE)
def test_switches_that_compute_nothing_else_change_no_bit(results, one, other):
    keys = ("train_loss", "grad_norm")
    assert results.figures(one, *keys) == results.figures(other, *keys)


@pytest.mark.parametrize(("one", "other"), BITWISE_LOSS)
def test_pipeline_cuts_change_no_bit_of_a_loss(results, one, other):
    assert results.figures(one, "train_loss") == results.figures(other, "train_loss")
    for (_, norm), (_, other_norm) in zip(results.figures(one, "grad_norm"), results.figures(other, "grad_norm"), strict=True):
        assert norm == pytest.approx(other_norm, rel=1e-6)


def test_confined_attention_changes_the_loss(results):
    assert results.rows("one_confined")[0]["train_loss"] != pytest.approx(results.rows("one_plain")[0]["train_loss"], rel=1e-5)


def test_validation_loss_is_the_same_in_every_layout(results):
    wanted = results.rows("one_plain")[-1]["val_loss"]
    for layout in ("tp2_plain", "pp2_plain", "dp2_plain", "cp2_plain", "vpp2_plain", "tp2_pp2_plain"):
        assert results.rows(layout)[-1]["val_loss"] == pytest.approx(wanted, rel=LOSS), layout


def test_health_panel_is_the_same_in_every_layout(results):
    wanted = {key: value for key, value in results.rows("one_plain")[1].items() if key.startswith("health/")}
    assert {key.split("/")[1] for key in wanted} == {"attn_alpha", "mlp_alpha", "sqk", "suv", "sz", "hidden_norm"}
    for layout in ("tp2_plain", "pp2_plain", "cp2_plain", "vpp2_plain"):
        row = results.rows(layout)[1]
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-4), layout


@pytest.mark.parametrize("layout", ["tp2_control", "pp2_control", "cp2_control"])
def test_the_norms_behind_each_layer_of_a_control_are_the_same_in_every_layout(results, layout):
    """Each layer has its own: another one's would be seen. The layers of nGPT all have 1."""
    wanted = {key: value for key, value in results.rows("one_control")[1].items() if key.startswith("health/hidden_norm/layers.")}
    assert wanted.keys() == {f"health/hidden_norm/layers.{layer}/{part}" for layer in range(4) for part in ("mean", "min", "max")}
    means = sorted(wanted[f"health/hidden_norm/layers.{layer}/mean"] for layer in range(4))
    assert all(larger > 1.001 * smaller for smaller, larger in pairwise(means))
    row = results.rows(layout)[1]
    assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("layout", ["one_bf16", "tp2_bf16", "dp2_bf16_overlap", "one_plain"])
def test_the_head_adds_its_gradient_to_the_fp32_sum_itself(results, layout):
    """The other linears are Transformer Engine's on a GPU, and are not asked for here."""
    for result in results.results(layout):
        assert [name.rpartition("module.")[2] for name in result["added_in_place"]] == ["output_layer.weight"]
