"""There and back over whole runs: train, export, import, export again, and go on training."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torchrun

HYBRID = "experiment=ngpt_hybrid_tiny"
MODELS = {
    "hybrid": [HYBRID, "model.layer_pattern=ME*E-/*E", "precision=bf16"],
    "tied": ["experiment=ngpt_tiny", "model.tied_embeddings=true", "model.activation=swiglu", "model.sz_init=10"],
    "nemotron_h": ["experiment=gpt_hybrid_tiny"],
    "arcee": ["experiment=gpt_tiny"],
    "suv": [HYBRID, "model.moe_suv=shared", "model.moe_expert_bias=false", "model.mamba_gated_norm=true", "model.activation=swiglu"],
}
CLASSES = {"hybrid": "ngpt", "tied": "ngpt", "nemotron_h": "nemotron_h", "arcee": "arcee", "suv": "ngpt"}
EXPORT = ["--no-tokenizer", "--parity", "none"]


def ngpt(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    done = torchrun.ngpt(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def first_row(run: Path) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture(scope="module", params=MODELS)
def name(request, workplace) -> str:
    """A run NAME of two steps, its export NAME_hf, and the run NAME_back that was imported from it."""
    name = request.param
    ngpt("train", *MODELS[name], f"run.name={name}", "train.steps=2", "train.eval_steps=0", cwd=workplace)
    ngpt("export", f"runs/{name}", "--out", f"{name}_hf", *EXPORT, cwd=workplace)
    ngpt("import", f"{name}_hf", "--run", f"{name}_back", cwd=workplace)
    return name


def publish(path: Path) -> None:
    """Rewrites Nemotron-H's tensors under their published names: experts one by one, and `backbone`."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, tensor in load_file(path).items():
        published = name.replace("model.", "backbone.", 1)
        if ".mixer.experts." in name:
            stem, _, last = published.rpartition(".")
            tensors |= {f"{stem}.{number}.{last}.weight": each.clone() for number, each in enumerate(tensor)}
        else:
            tensors[published] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def same_files(first: Path, second: Path) -> bool:
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()
    return (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_an_import_exports_the_same_bytes(name, workplace):
    assert json.loads((workplace / f"{name}_hf" / "config.json").read_text())["model_type"] == CLASSES[name]
    ngpt("export", f"runs/{name}_back", "--out", f"{name}_again", *EXPORT, cwd=workplace)
    assert same_files(workplace / f"{name}_hf", workplace / f"{name}_again")


def test_training_goes_on_as_from_the_run_itself(name, workplace):
    """Both load weights alone; a BF16 run takes those of the import rounded, which are the weights that it trained with."""
    options = [*MODELS[name], "train.steps=1", "train.eval_steps=0", "checkpoint=none", "logging.health_interval=1"]
    rows = []
    for source in (name, f"{name}_back"):
        ngpt("train", *options, f"run.name={source}_on", f"checkpoint.load=runs/{source}/checkpoints", cwd=workplace)
        rows.append(first_row(workplace / "runs" / f"{source}_on"))
    timed = ("time", "second", "memory", "tflops", "mfu", "retries")
    before, after = ({key: value for key, value in row.items() if not any(word in key for word in timed)} for row in rows)
    assert before == after and before["train_loss"] > 0


@pytest.mark.parametrize("name", ["hybrid"], indirect=True)
def test_the_written_options_train_without_an_experiment(name, workplace):
    """They are enough, and what config.json does not say may be chosen."""
    start = [f"checkpoint.load=runs/{name}_back/checkpoints", "train.steps=1", "train.eval_steps=0", "precision=bf16"]
    batch = ["train.seq_length=32", "train.micro_batch_size=2", "train.global_batch_size=8", "logging.interval=1"]
    chosen = ["model.moe_aux_loss=seq_aux_loss", "model.moe_aux_loss_coeff=1e-2"]
    options = ["--config-dir", f"runs/{name}_back/conf", "model=imported", "tokenizer=imported"]
    ngpt("train", *MODELS[name], *start, "run.name=by_experiment", cwd=workplace)
    ngpt("train", *options, *start, *batch, *chosen, "run.name=by_options", cwd=workplace)
    runs = workplace / "runs"
    assert first_row(runs / "by_experiment")["train_loss"] == first_row(runs / "by_options")["train_loss"]


@pytest.mark.parametrize("name", ["nemotron_h", "arcee"], indirect=True)
def test_what_transformers_saves_comes_back(name, workplace):
    """Its words for the config, and Nemotron-H's tensors as they are published, which transformers reads as the same model."""
    from transformers import AutoModelForCausalLM

    model, saved = AutoModelForCausalLM.from_pretrained(workplace / f"{name}_hf"), workplace / f"{name}_saved"
    model.save_pretrained(saved)
    if name == "nemotron_h":
        publish(saved / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert all(tensor.equal(again[key]) for key, tensor in model.state_dict().items())
    ngpt("import", f"{name}_saved", "--run", f"{name}_saved", cwd=workplace)
    ngpt("export", f"runs/{name}_saved", "--out", f"{name}_anew", *EXPORT, cwd=workplace)
    assert same_files(workplace / f"{name}_hf", workplace / f"{name}_anew")


@pytest.mark.parametrize("name", ["hybrid"], indirect=True)
def test_bf16_comes_back_exactly_and_other_numbers_do_not_come_in(name, workplace):
    import torch
    from safetensors.torch import load_file, save_file

    ngpt("export", f"runs/{name}", "--out", "rounded", "--dtype", "bfloat16", *EXPORT, cwd=workplace)
    ngpt("import", "rounded", "--run", "rounded", cwd=workplace)
    ngpt("export", "runs/rounded", "--out", "rounded_again", *EXPORT, cwd=workplace)
    before, after = (load_file(workplace / folder / "model.safetensors") for folder in ("rounded", "rounded_again"))
    assert all(torch.equal(before[name].float(), after[name]) for name in after) and before.keys() == after.keys()
    for change, told in ((lambda w: 1.1 * w, "differ from 1 by 0.1"), (lambda w: w[:, :-1].contiguous(), "has the shape")):
        folder = workplace / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(workplace / "rounded", folder)
        weight = "model.layers.4.mixer.up_proj.weight"
        save_file(before | {weight: change(before[weight])}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AssertionError, match=told):
            ngpt("import", "changed", "--run", "changed", cwd=workplace)
        assert not list((workplace / "runs").glob("changed*"))
