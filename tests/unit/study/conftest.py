"""The runs of the small study, which results, figures and the page are made of."""

import json

import pytest

from tests.unit.analysis.runs import record, summary, write_run
from tests.unit.study.studies import SHOWN, planned


@pytest.fixture
def study(tmp_path):
    """The runs of the small study: the recipe costs 0.1 and 0.2 nats, one wide run has failed, and another's analysis is missing."""
    plan, folder = planned(tmp_path, text=SHOWN), tmp_path / "out"
    for run in plan.runs:
        if run.name == "wide/hidden_size=128_seed=2":
            continue
        cost = 0.1 * run.seed if "nvfp4" in run.arm else 0.0
        losses = [record(step, val_loss=4.0 - step / 100 + 0.01 * run.seed + cost) for step in (2, 4, 8)]
        status = "stopped" if run.arm == "gpt_trunk" else "finished"
        write_run(folder / run.name, losses, summary=summary(status=status, steps=8))
    for analysis in plan.analyses[:3]:
        path = folder / analysis.file
        path.parent.mkdir(parents=True, exist_ok=True)
        layers = {f"layers.{layer}.qkv": {"gain": {"value": 6.0 + layer}, "rho": {"value": 0.02}, "noise": 1e-4} for layer in (0, 1)}
        path.write_text(json.dumps({"results": {"linears": layers}}))
    return plan, folder
