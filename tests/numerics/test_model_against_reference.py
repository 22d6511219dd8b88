"""The models that Megatron trains, against the fp64 reference written from the mathematics alone."""

import json
from pathlib import Path

import pytest
from model_probe import SPECS
from torchrun import launch

FP32 = 5e-6  # relative norm of the difference; an fp32 forward and backward pass over 4 sub-blocks
HYBRID = [name for name in SPECS if "hybrid" in name]
# A head's dt_bias and A_log have gradients that sum over 34 tokens, 4 features and 5 states, of both signs: one rounding a term.
SCAN_RATES, SCAN = ("dt_bias", "A_log"), 34 * 4 * 5 * 2**-24
# A changed token may send others to other experts. A matrix product with another number of rows adds its 48 terms in another order,
# which differs by a rounding a term, relative to the largest logit. Without experts the same products are computed: nothing moves.
UNMOVED = {spec: 48 * 2**-24 if spec in HYBRID else 0.0 for spec in SPECS}
# Attention, MLP and Mamba layers: 4 in the dense models, 3 in the hybrid ones.
PROJECTIONS = dict.fromkeys(SPECS, 4) | dict.fromkeys(HYBRID, 3) | {"hybrid_top1": 2, "hybrid_top1_softmax": 1}
PREDICTION = {"mtp": 2, "mtp_gated_tied": 1, "mtp_hybrid": 2, "control_mtp": 2, "control_mtp_hybrid": 1}  # depths
PROJECTIONS |= {"mtp": 8, "mtp_gated_tied": 6, "mtp_hybrid": 5, "control_mtp": 8}
WITHOUT_MAMBA = [name for name in SPECS if name not in HYBRID] + ["hybrid_top1_softmax"]


@pytest.fixture(scope="module")
def deviations(tmp_path_factory) -> dict[str, dict[str, float]]:
    out = tmp_path_factory.mktemp("probe") / "deviations.json"
    launch(Path(__file__).with_name("model_probe.py"), [str(out)], processes=1)
    return json.loads(out.read_text())


@pytest.mark.parametrize("spec", SPECS)
def test_logits_and_loss(deviations, spec):
    assert deviations[spec]["logits"] < FP32
    assert deviations[spec]["logits_looked_at"] < FP32
    assert deviations[spec]["loss"] < FP32


@pytest.mark.parametrize("spec", PREDICTION)
def test_logits_and_losses_of_prediction_depths(deviations, spec):
    for kind in ("mtp_logits", "mtp_loss"):
        found = {name: value for name, value in deviations[spec].items() if name.startswith(f"{kind}/")}
        assert len(found) == PREDICTION[spec] and max(found.values()) < FP32, found


@pytest.mark.parametrize("spec", SPECS)
def test_every_gradient(deviations, spec):
    gradients = {name: value for name, value in deviations[spec].items() if name.startswith("grad/")}
    beyond = {name: value for name, value in gradients.items() if value > (SCAN if name.endswith(SCAN_RATES) else FP32)}
    assert len(gradients) > 10 and not beyond


@pytest.mark.parametrize("spec", SPECS)
def test_what_reaches_and_leaves_the_output_projections(deviations, spec):
    """The logits cannot see fine-grained normalisation; the projections' inputs can."""
    seen = {name: value for name, value in deviations[spec].items() if name.startswith("seen/")}
    assert len(seen) == 2 * PROJECTIONS[spec] and max(seen.values()) < FP32, seen


@pytest.mark.parametrize("spec", SPECS)
def test_changing_a_token_changes_no_earlier_logit(deviations, spec):
    assert deviations[spec]["causality"] <= UNMOVED[spec]
    assert deviations[spec]["change_is_seen"] > 1e-3


@pytest.mark.parametrize("spec", SPECS)
def test_token_0_reaches_later_tokens_only_through_attention(deviations, spec):
    assert deviations[spec]["token_0_without_attention"] <= UNMOVED[spec]


@pytest.mark.parametrize("spec", SPECS)
def test_padding_rows_of_the_vocabulary_have_no_probability(deviations, spec):
    assert deviations[spec]["padding_probability"] == 0.0


@pytest.mark.parametrize("spec", SPECS)
def test_counted_parameters_are_those_of_the_built_model(deviations, spec):
    assert deviations[spec]["counted"] == deviations[spec]["parameters"]


@pytest.mark.parametrize("spec", SPECS)
def test_the_health_panel_shows_every_hidden_norm(deviations, spec):
    assert deviations[spec]["hidden_norms"] < FP32


@pytest.mark.parametrize("spec", HYBRID)
def test_the_health_panel_counts_the_tokens_of_every_expert_of_every_layer(deviations, spec):
    """The layers of prediction depths, which Megatron counts from 1 again, have rows of their own."""
    counted, wanted = deviations[spec]["expert_loads"]
    assert counted == wanted and sum(map(sum, counted)) > 0


@pytest.mark.parametrize("spec", [name for name in HYBRID if not name.startswith("control") and "not_fine_grained" not in name])
def test_what_reaches_the_output_projections_of_experts_has_unit_norm(deviations, spec):
    assert deviations[spec]["expert_input_norm"] < 1e-6


@pytest.mark.parametrize("spec", ["hybrid", "hybrid_not_fine_grained", "hybrid_overlap", "hybrid_top1", "control_hybrid"])
def test_experts_without_tokens_are_among_those_compared(deviations, spec):
    """Their gradients are zeros, on both sides."""
    assert deviations[spec]["experts_without_tokens"] > 0


@pytest.mark.parametrize(
    ("grouped", "sequential"),
    [
        ("hybrid_grouped", "hybrid"),
        ("hybrid_grouped_softmax", "hybrid_softmax"),
        ("hybrid_grouped_gated", "hybrid_shared_suv"),
        ("control_hybrid_grouped", "control_hybrid"),
    ],
)
def test_grouped_experts_write_the_checkpoint_of_sequential_ones(deviations, grouped, sequential):
    assert len(deviations[grouped]["checkpoint"]) > 10
    assert deviations[grouped]["checkpoint"] == deviations[sequential]["checkpoint"]


@pytest.mark.parametrize("spec", WITHOUT_MAMBA)
def test_a_document_with_confined_attention_sees_only_itself(deviations, spec):
    """Logits of the second document equal those of the document alone: rotary positions are relative."""
    assert deviations[spec]["confined_document"] < FP32
