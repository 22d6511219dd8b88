"""One export beside a run, of a checkpoint that torch's own writer made. Whole runs: tests/integration/test_export.py."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from launch import hf_worker
from launch.cli import main as cli
from launch.hf_exports import SUPERSEDED, Request
from ngpt.checkpoints.choice import folder_of
from ngpt.checkpoints.hashing import hash_file
from ngpt.checkpoints.manifest import Manifest
from ngpt.config.compose import compose, dump
from ngpt.hf import export as hf

SIZES = {
    "embedding.word_embeddings.weight": (384, 64),
    "decoder.layers.0.mlp.linear_fc1.weight": (160, 64),
    "decoder.layers.0.mlp.linear_fc1.suv.stored": (160,),
    "decoder.layers.0.mlp.linear_fc2.weight": (64, 160),
    "decoder.layers.0.mlp_bda.alpha.stored": (64,),
    "output_layer.weight": (384, 64),
    "sz.stored": (384,),
}
STEP = 3


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run of one MLP with a checkpoint; this process stays as it is, whatever the exports are to do to theirs."""
    config = compose(["experiment=ngpt_tiny", "model.num_layers=1", "model.layer_pattern=-", f"run.dir={tmp_path / 'run'}"])
    checkpoint = folder_of(config.checkpoint.dir, STEP)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(checkpoint), no_dist=True)
    Manifest(STEP, {path.name: hash_file(path) for path in checkpoint.iterdir()}).save(checkpoint)
    dump(config, tmp_path / "run" / "config.yaml")
    monkeypatch.setattr(hf_worker, "end_with_parent", lambda parent: None)
    monkeypatch.setattr(hf_worker, "step_back", lambda: None)
    return tmp_path / "run"


def export(run: Path, **changes) -> int:
    request = asdict(Request(str(run), STEP, check=False, room=0, beside=True)) | changes
    return hf_worker.main(["1", json.dumps(request)])


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / f"iter_{STEP:07d}"


def test_the_folder_is_the_one_of_an_export_without_a_comparison(run, capsys):
    assert export(run) == 0
    assert capsys.readouterr().out.startswith(f"step {STEP}: NGPTForCausalLM, ")
    folder = checkpoint(run) / "hf"
    weights = load_file(folder / "model.safetensors")
    wanted = {"output_layer.weight": torch.empty(384, 64)}
    dcp.load(wanted, storage_reader=dcp.FileSystemReader(checkpoint(run)), no_dist=True)
    assert torch.equal(weights["lm_head.weight"], wanted["output_layer.weight"][:257])
    assert json.loads((folder / hf.RECORD).read_text()) == {"step": STEP, "run": "ngpt_tiny", "parity": None}
    assert {"README.md", "config.json", "tokenizer.json", "modeling_ngpt.py"} <= {path.name for path in folder.iterdir()}
    assert not list(checkpoint(run).glob("*.partial"))


def test_an_export_without_a_comparison_starts_no_worker_and_writes_the_same_bytes(run, tmp_path, monkeypatch, capsys):
    def started(*_) -> int:
        raise AssertionError("a worker was started")

    monkeypatch.setattr("launch.export.run_task", started)
    assert cli(["export", str(run), "--out", str(tmp_path / "out"), "--parity", "none"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("open it with transformers.")
    assert export(run) == 0
    beside = {path.name: path.read_bytes() for path in (checkpoint(run) / "hf").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == beside and len(beside) > 5
    with pytest.raises(AssertionError, match="a worker was started"):
        cli(["export", str(run), "--out", str(tmp_path / "compared")])


def test_a_checkpoint_that_goes_or_is_replaced_meanwhile_is_superseded_not_an_error(run, monkeypatch, capsys):
    write = hf.write_folder

    def replaced(cfg, choice, options, folder):
        done = write(cfg, choice, options, folder)
        shutil.copytree(checkpoint(run), run / "new")
        checkpoint(run).rename(run / "old")
        (run / "new").rename(checkpoint(run))
        return done

    monkeypatch.setattr(hf, "write_folder", replaced)
    assert export(run) == SUPERSEDED
    assert not (checkpoint(run) / "hf").exists() and not (run / "old" / "hf").exists()
    monkeypatch.setattr(hf, "write_folder", lambda *_: shutil.rmtree(checkpoint(run)))
    assert export(run) == SUPERSEDED
    assert export(run) == SUPERSEDED  # gone before it was begun
    assert capsys.readouterr().out == ""


def test_too_little_room_for_the_weights_and_the_next_checkpoint_is_one_line_and_nothing_is_written(run, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    size = 4 * sum(torch.Size(shape).numel() for shape in SIZES.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 * size, 8 * size, 2 * size))
    assert export(run, room=2 * size) == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "checkpoint.keep_last" in said and not (checkpoint(run) / "hf").exists()
    assert export(run, room=size // 2) == 0


def test_only_what_was_not_just_written_is_read_through(run, capsys):
    shard = max(checkpoint(run).glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # behind the tensors
    shard.write_bytes(content)
    assert export(run, check=True) == 2
    assert "another checksum" in capsys.readouterr().out and not (checkpoint(run) / "hf").exists()


def test_an_error_that_nobody_expects_ends_with_its_cause(run, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("a broken disk")

    monkeypatch.setattr(hf, "describe", broken)
    assert export(run) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "RuntimeError: a broken disk"
    assert not list(checkpoint(run).glob("hf*"))


def test_the_process_has_the_lowest_priority_within_and_among_sessions():
    code = (
        "import os; from pathlib import Path; from launch.hf_worker import step_back; step_back()\n"
        "group = Path('/proc/self/autogroup')\n"
        "print(os.getpriority(os.PRIO_PROCESS, 0), group.read_text().split()[-1] if group.exists() else 19, flush=True)\n"
        "os._exit(0)\n"  # a busy machine leaves little to such a process
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True, check=True)
    assert done.stdout.split() == ["19", "19"]
