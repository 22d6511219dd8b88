"""Megatron's Mamba mixer on a CPU, inside its hybrid model, against the fp64 reference written from the equations."""

import json
from pathlib import Path

import pytest
from mamba_probe import CASES, HIDDEN, SIZES
from torchrun import launch

FP32 = 5e-6  # relative norm of the difference
BF16 = 3e-2  # the linears, the convolution and the scan round to bf16 in turn


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("mamba") / "deviations.json"
    launch(Path(__file__).with_name("mamba_probe.py"), [str(out)], processes=1)
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_mixer_loss_and_every_gradient(measured, case):
    deviations = measured[case]["deviations"]
    assert len(deviations) == (12 if CASES[case].get("rmsnorm", True) else 11) + 1
    assert max(deviations.values()) < (BF16 if case == "bf16" else FP32), deviations


def test_checkpoints_hold_the_norm_beside_the_parts_of_the_projection_and_the_convolution(measured):
    heads, head_dim, groups, state = SIZES["grouped"]
    inner, vectors = heads * head_dim, groups * state
    parts = {"z": inner, "x": inner, "B": vectors, "C": vectors, "dt": heads}
    wanted = {f"in_proj.weight.{name}": [size, HIDDEN] for name, size in parts.items()}
    wanted |= {f"conv1d.{kind}.{name}": [parts[name], *rest] for kind, rest in (("weight", [1, 4]), ("bias", [])) for name in "xBC"}
    wanted |= {"norm.weight": [inner], "out_proj.weight": [HIDDEN, inner], "A_log": [heads], "D": [heads], "dt_bias": [heads]}
    assert measured["grouped"]["checkpoint"] == wanted
