"""`ngpt export` of a run that two ranks trained: what it writes, what its comparison with the trainer sees, and what it refuses."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchrun import launch, ngpt

from launch.cli import main
from ngpt.checkpoint_tensors import CheckpointTensors
from ngpt.checkpoints.manifest import METADATA_FILE

LAUNCH_SECONDS = 600  # a hang ends here; no statement about speed
# With a prediction depth, which transformers must pass over in silence.
MODEL = "experiment=ngpt_hybrid_tiny model.layer_pattern=ME*E-/*E precision=bf16 model.sz_init=3"
OVERRIDES = f"{MODEL} data=mock parallel=ep2 cluster.gpus_per_node=2 train.steps=2 run.dir=run checkpoint.hf=true"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a run of two expert-parallel ranks, in bf16 with fp32 masters, and its export."""
    folder = tmp_path_factory.mktemp("workplace")
    for command in (["train", *OVERRIDES.split()], ["export", "run", "--out", "export"]):
        done = ngpt(*command, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def seen(workplace) -> dict[str, dict]:
    """What the comparison finds in exports that were changed."""
    (workplace / "changed").mkdir()
    out = workplace / "seen.json"
    launch(Path(__file__).with_name("parity_probe.py"), [str(workplace / "run"), str(workplace / "changed"), str(out)], processes=1)
    return json.loads(out.read_text())


def test_every_tensor_is_read_as_torch_reads_it(workplace):
    folder = workplace / "run" / "checkpoints" / "iter_0000002"
    source = CheckpointTensors(folder)
    assert len(list(folder.glob("*.distcp"))) == 2, "both ranks saved"
    read = {name: source.read(name) for name in source.sizes}
    expected = {name: torch.empty_like(tensor) for name, tensor in read.items()}
    dcp.load(expected, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert len(read) > 100 and all(torch.equal(read[name], expected[name]) for name in read)


def test_the_folder_holds_all_that_a_user_needs(workplace):
    names = {path.name for path in (workplace / "export").iterdir()}
    weights = {"model.safetensors", "config.json", "generation_config.json", "configuration_ngpt.py", "modeling_ngpt.py"}
    assert names == weights | {"tokenizer.json", "tokenizer_config.json", "README.md", "ngpt_export.json"}
    assert not list(workplace.glob("export.partial*")), "nothing unfinished stays"
    found = json.loads((workplace / "export" / "ngpt_export.json").read_text())
    assert found["step"] == 2 and found["parity"]["holds"]
    card = (workplace / "export" / "README.md").read_text()
    assert "trainer and export agree on 128 tokens" in card and str(workplace) not in card


def assert_exported(beside: Path, export: Path) -> None:
    """The same bytes in every file, but for what the comparison adds."""
    names = {path.name for path in export.iterdir()}
    assert {path.name for path in beside.iterdir()} == names
    for name in names - {"README.md", "ngpt_export.json"}:
        assert (beside / name).read_bytes() == (export / name).read_bytes(), name
    records = [json.loads((folder / "ngpt_export.json").read_text()) for folder in (beside, export)]
    assert records[0].pop("parity") is None and records[1].pop("parity") and records[0] == records[1]
    cards = [(folder / "README.md").read_text().splitlines() for folder in (beside, export)]
    differing = [mine for mine, other in zip(*cards, strict=True) if mine != other]
    assert len(differing) == 1 and "Comparison with the trained model | not run" in differing[0]


def test_checkpoint_hf_writes_what_an_export_writes_and_the_next_launch_what_a_killed_one_left_undone(workplace):
    checkpoint = workplace / "run" / "checkpoints" / "iter_0000002"
    assert_exported(checkpoint / "hf", workplace / "export")
    (checkpoint / "hf").rename(checkpoint / "hf.partial")
    (checkpoint / "hf.partial" / "config.json").unlink()
    again = ngpt("train", *OVERRIDES.split(), cwd=workplace)
    assert again.returncode == 0 and "nothing to train" in again.stdout
    told = "Hugging Face weights of step 2: run/checkpoints/iter_0000002/hf"
    assert again.stderr.splitlines()[-1] == told and told in (workplace / "run" / "console.log").read_text()
    assert_exported(checkpoint / "hf", workplace / "export")
    assert not list(checkpoint.glob("*.partial"))


def test_a_user_opens_it_without_this_project(workplace):
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained('export', trust_remote_code=True)\n"
        "model = AutoModelForCausalLM.from_pretrained('export', trust_remote_code=True)\n"
        "ids = model.generate(**tokenizer('The ', return_tensors='pt'), max_new_tokens=4, do_sample=False)\n"
        "assert not any(name.split('.')[0] in ('ngpt', 'megatron', 'launch') for name in sys.modules)\n"
        "print(ids[0].tolist())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(workplace / "modules")}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=LAUNCH_SECONDS, check=False)
    assert done.returncode == 0 and "mtp" not in done.stderr, done.stderr
    ids = json.loads(done.stdout.splitlines()[-1])
    assert ids[:5] == [256, *b"The "] and len(ids) <= 9


@pytest.mark.parametrize("mode", ["full", "layers"])
def test_the_comparison_accepts_what_was_trained(mode, seen):
    found = seen[f"nothing {mode}"]
    assert found["holds"] and found["layer"] is None and found["disagreeing"] == 0
    assert 0 < found["logit_difference"] <= 1e-5
    assert math.isclose(found["loss_trainer"], found["loss_export"], rel_tol=1e-6)


@pytest.mark.parametrize("mode", ["full", "layers"])
def test_the_comparison_names_the_layer_that_was_changed(mode, seen):
    found = seen[f"swapped_keys {mode}"]
    assert not found["holds"] and found["logit_difference"] > found["bound"] and found["layer"] == 2


@pytest.mark.parametrize("mode", ["full", "layers"])
def test_the_comparison_sees_one_wrong_entry_of_a_scale(mode, seen):
    found = seen[f"one_scale {mode}"]
    assert not found["holds"] and found["logit_difference"] > found["bound"] and found["layer"] is None


@pytest.mark.parametrize("mode", ["full", "layers"])
def test_the_comparison_counts_tokens_that_go_to_other_experts(mode, seen):
    found = seen[f"other_experts {mode}"]
    assert not found["holds"] and found["disagreeing"] > 0.5 * found["tokens"]


def copied(workplace: Path, folder: Path) -> Path:
    """The run again, to be damaged."""
    shutil.copytree(workplace / "run", folder / "run", ignore=shutil.ignore_patterns("logs", "tensorboard"))
    return folder / "run"


def refused(capsys, *arguments: object) -> str:
    """The one line that a command ends with."""
    assert main(["export", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_bad_input_is_one_line_each_and_nothing_is_written(workplace, tmp_path, capsys):
    run, out = workplace / "run", tmp_path / "out"
    assert "It exists" in refused(capsys, run, "--out", workplace / "export")
    assert "There are checkpoints of 2" in refused(capsys, run, "--out", out, "--step", 7)
    assert "A run folder is needed" in refused(capsys, tmp_path, "--out", out)
    half = copied(workplace, tmp_path)
    (half / "checkpoints" / "iter_0000002" / METADATA_FILE).unlink()
    assert METADATA_FILE in refused(capsys, half, "--out", out)
    assert not out.exists()


def test_a_changed_byte_of_a_shard_is_found_before_anything_is_written(workplace, tmp_path, capsys):
    run = copied(workplace, tmp_path)
    shard = max((run / "checkpoints" / "iter_0000002").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "another checksum" in refused(capsys, run, "--out", tmp_path / "out")


def test_a_run_whose_data_are_gone_is_exported_without_a_tokenizer_only(workplace, tmp_path, capsys):
    run = copied(workplace, tmp_path)
    config = run / "config.yaml"
    text = config.read_text().replace("mock: true", "mock: false")
    text = text.replace("train: []", f"train: [{{path: {tmp_path}/gone/train}}]").replace("valid: []", "valid: [{path: gone/valid}]")
    config.write_text(text)
    assert "not prepared data" in refused(capsys, run, "--out", tmp_path / "out")
