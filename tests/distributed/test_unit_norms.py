"""Every marked matrix has unit norm along D: when the model is built, after a load and after every step, in every setting."""

import pytest
from cases import FOUR_PROCESSES, MODELS, ONE_PROCESS, TWO_PROCESSES

BF16_ROUNDING = 4e-3  # half an ulp of BF16 in every entry of a 64-vector moves its norm by less
FP32 = 1e-6
NORMALISED = sorted({case.name.removesuffix("_1").removesuffix("_2") for case in ONE_PROCESS + TWO_PROCESSES + FOUR_PROCESSES
                     if case.model != "control" and not case.name.startswith(("seed", "norm_check"))})  # fmt: skip
# 2 layers of 4 matrices, embedding and head; 4 layers and, since tied, no head.
MATRICES = {"plain": 10, "gated": 17}


@pytest.mark.parametrize("name", NORMALISED)
def test_masters_and_model_weights_have_unit_norm(results, name):
    rows, bound = results.rows(name), BF16_ROUNDING if "bf16" in name else FP32
    assert results.summary(name)["start_norm_deviation"] < FP32  # built or loaded, before the first step
    checked = [row["worst_norm_deviation"] for row in rows if "worst_norm_deviation" in row]
    assert checked and max(checked) < FP32
    for result in results.results(name):
        assert result["model_norms"] and max(result["model_norms"].values()) < bound  # after the last step's gather


@pytest.mark.parametrize("name", ["seed_plain", "seed_gated", "one_bf16", "tp2_plain", "vpp2_gated", "dp2_bf16"])
def test_model_is_built_with_unit_norms(results, name):
    bound = BF16_ROUNDING if "bf16" in name else FP32
    for result in results.results(name):
        assert max(result["built"].values()) < bound


@pytest.mark.parametrize("model", [model for model in MODELS if model != "control"])
def test_every_matrix_of_the_model_is_marked_once(results, model):
    assert len(results.results(f"one_{model}")[0]["built"]) == MATRICES[model]
    stages = [set(result["built"]) for result in results.results(f"pp2_{model}")]
    # A tied embedding lives on both ends of the pipeline.
    assert sum(map(len, stages)) == MATRICES[model] + (model == "gated")


# The end of a matrix's name -> its axis that lies along the stream: it reads vectors of D features, or writes them.
READS = ("linear_qkv", "linear_fc1", "in_proj", "router", "word_embeddings", "output_layer")
WRITES = ("linear_proj", "linear_fc2", "out_proj", "eh_proj")


STREAMS = ["one_plain", "one_gated", "one_hybrid", "one_hybrid_gated", "one_mtp", "one_mtp_hybrid", "tp2_plain", "tp2_hybrid"]


@pytest.mark.parametrize("name", STREAMS)
def test_the_axis_of_unit_norm_lies_along_the_stream(results, name):
    for result in results.results(name):
        assert result["unit_axes"]
        for weight, (shape, axis) in result["unit_axes"].items():
            role = weight.removesuffix(".weight").rpartition(".")[2]
            assert (role in READS, role in WRITES) == (axis == 1, axis == 0), weight
            assert shape[axis] == 64, weight


def test_control_has_no_marked_matrix(results):
    assert results.results("one_control")[0]["built"] == {}


def test_self_check_stops_a_run_beyond_the_tolerance(results):
    (result,) = results.results("norm_check_stops")
    assert "debug.norm_tolerance is 1e-12" in result["error"]
    assert results.summary("norm_check_stops")["status"] == "failed"
