"""`ngpt import`: a folder becomes a run, which exports the same numbers again, and which other commands know for what it is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchrun import ngpt


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A hybrid nGPT model that transformers wrote, in `hf`, imported as the run `x`."""
    from ngpt.config import compose
    from ngpt.hf.configuration_ngpt import NGPTConfig
    from ngpt.hf.modeling_ngpt import NGPTForCausalLM
    from ngpt.hf.targets import target_of

    folder = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    target = target_of(compose(["experiment=ngpt_hybrid_tiny", "model.activation=swiglu", "model.vocab_size=300"]))
    model = NGPTForCausalLM(NGPTConfig(**target.config))
    for name, tensor in model.state_dict().items():
        if tensor.dim() < 2 or name.endswith("suv"):
            tensor += 0.01 * torch.rand_like(tensor)  # equal scales would hide where each one goes
    model.save_pretrained(folder / "hf")
    done = ngpt("import", "hf", "--run", "x", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 0 of runs/x" in done.stdout and "model.moe_aux_loss=none" in done.stdout
    return folder


def test_the_run_computes_what_the_folder_does_and_holds_its_numbers(workplace):
    done = ngpt("export", "runs/x", "--out", "again", "--no-tokenizer", "--parity", "full", cwd=workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (load_file(workplace / name / "model.safetensors") for name in ("hf", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_no_run_goes_on_with_an_optimizer_that_is_not_there(workplace):
    done = ngpt("train", "--config", "runs/x/config.yaml", cwd=workplace)
    assert done.returncode == 2 and "it holds weights alone" in done.stderr and "checkpoint.load=runs/x/checkpoints" in done.stderr
    told = ngpt("status", "runs/x", cwd=workplace)
    assert told.returncode == 0 and "checkpoint.load=runs/x/checkpoints" in told.stdout


def test_a_report_has_nothing_to_tell_yet(workplace):
    done = ngpt("report", "runs/x", cwd=workplace)
    assert done.returncode == 2 and "metrics.jsonl" in done.stderr and "Traceback" not in done.stderr


def test_a_refusal_leaves_what_was_there(workplace):
    (workplace / "bare").mkdir()
    there = sorted(path.name for path in (workplace / "runs").iterdir())
    for arguments, told in ((("hf", "--run", "x"), "--run: runs/x. It exists"), (("bare", "--run", "y"), "no config.json there")):
        done = ngpt("import", *arguments, cwd=workplace)
        assert done.returncode == 2 and told in done.stderr
    (workplace / "bare" / "config.json").write_text('{"model_type": "qwen3"}')
    done = ngpt("import", "bare", "--run", "y", cwd=workplace)
    assert done.returncode == 2 and "no *.safetensors" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in (workplace / "runs").iterdir()) == there
