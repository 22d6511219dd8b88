"""The models that Megatron trains, against the fp64 reference written from the mathematics alone."""

import json
from pathlib import Path

import pytest
from model_probe import SPECS
from torchrun import launch

FP32 = 5e-6  # relative norm of the difference; an fp32 forward and backward pass over 4 sub-blocks
NGPT = [name for name in SPECS if not name.startswith("control")]


@pytest.fixture(scope="module")
def deviations(tmp_path_factory) -> dict[str, dict[str, float]]:
    out = tmp_path_factory.mktemp("probe") / "deviations.json"
    launch(Path(__file__).with_name("model_probe.py"), [str(out)], processes=1)
    return json.loads(out.read_text())


@pytest.mark.parametrize("spec", SPECS)
def test_logits_and_loss(deviations, spec):
    assert deviations[spec]["logits"] < FP32
    assert deviations[spec]["loss"] < FP32


@pytest.mark.parametrize("spec", SPECS)
def test_every_gradient(deviations, spec):
    gradients = {name: value for name, value in deviations[spec].items() if name.startswith("grad/")}
    assert len(gradients) > 10 and max(gradients.values()) < FP32, gradients


@pytest.mark.parametrize("spec", SPECS)
def test_what_reaches_and_leaves_the_output_projections(deviations, spec):
    """The logits cannot see fine-grained normalisation; the projections' inputs can."""
    seen = {name: value for name, value in deviations[spec].items() if name.startswith("seen/")}
    assert len(seen) == 8 and max(seen.values()) < FP32, seen


@pytest.mark.parametrize("spec", SPECS)
def test_changing_a_token_changes_no_earlier_logit(deviations, spec):
    assert deviations[spec]["causality"] == 0.0
    assert deviations[spec]["change_is_seen"] > 1e-3


@pytest.mark.parametrize("spec", SPECS)
def test_token_0_reaches_later_tokens_only_through_attention(deviations, spec):
    assert deviations[spec]["token_0_without_attention"] == 0.0


@pytest.mark.parametrize("spec", SPECS)
def test_padding_rows_of_the_vocabulary_have_no_probability(deviations, spec):
    assert deviations[spec]["padding_probability"] == 0.0


@pytest.mark.parametrize("spec", SPECS)
def test_counted_parameters_are_those_of_the_built_model(deviations, spec):
    assert deviations[spec]["counted"] == deviations[spec]["parameters"]


@pytest.mark.parametrize("spec", SPECS)
def test_a_document_with_confined_attention_sees_only_itself(deviations, spec):
    """Logits of the second document equal those of the document alone: rotary positions are relative."""
    assert deviations[spec]["confined_document"] < FP32
