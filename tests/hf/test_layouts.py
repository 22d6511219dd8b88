"""`ngpt export` of runs of every layout and kind of model: each is compared with the trainer before it has its name."""

import json
from pathlib import Path

import pytest
from torchrun import ngpt

# What is trained, and the class that it becomes.
RUNS = {
    "dense_tp2": ("experiment=ngpt_tiny parallel=tp2 cluster.gpus_per_node=2", "NGPTForCausalLM"),
    "dense_pp2_tied_gated": (
        "experiment=ngpt_tiny parallel=pp2 cluster.gpus_per_node=2 model.tied_embeddings=true model.activation=swiglu precision=bf16",
        "NGPTForCausalLM",
    ),
    "moe_ep2_tp2": (
        "experiment=ngpt_hybrid_tiny parallel=ep2 parallel.tensor=2 parallel.expert_tensor=1 cluster.gpus_per_node=2 precision=bf16",
        "NGPTForCausalLM",
    ),
    "hybrid_depths_shared_suv": (
        "experiment=ngpt_hybrid_tiny model.layer_pattern=ME*E-/*E model.moe_suv=shared model.activation=swiglu",
        "NGPTForCausalLM",
    ),
    "control_dense": ("experiment=gpt_tiny parallel=tp2 cluster.gpus_per_node=2 precision=bf16", "ArceeForCausalLM"),
    "control_gated_tied": ("experiment=gpt_tiny model.activation=swiglu model.tied_embeddings=true", "LlamaForCausalLM"),
    "control_hybrid": ("experiment=gpt_hybrid_tiny parallel=ep2 cluster.gpus_per_node=2 precision=bf16", "NemotronHForCausalLM"),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.mark.parametrize(("parity", "dtype"), [("full", "float32"), ("layers", "bfloat16")])
@pytest.mark.parametrize("name", RUNS)
def test_what_is_exported_computes_what_was_trained(name, parity, dtype, workplace):
    overrides, expected = RUNS[name]
    if not (workplace / "runs" / name).exists():
        trained = ngpt("train", *overrides.split(), "data=mock", "train.steps=2", f"run.name={name}", cwd=workplace)
        assert trained.returncode == 0, trained.stdout + trained.stderr
    out = f"{name}_{parity}_{dtype}"
    done = ngpt("export", f"runs/{name}", "--out", out, "--parity", parity, "--dtype", dtype, cwd=workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((workplace / out / "ngpt_export.json").read_text())["parity"]
    assert found["holds"] and found["mode"] == parity and found["logit_difference"] <= 1e-5 * max(1, found["largest_logit"])
    assert json.loads((workplace / out / "config.json").read_text())["architectures"] == [expected]
