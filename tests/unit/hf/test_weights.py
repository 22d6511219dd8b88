"""Weights on their way from a checkpoint that torch's own writer made into safetensors."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from ngpt.checkpoint_tensors import MASTER_PREFIX, CheckpointTensors
from ngpt.config import ConfigError, compose
from ngpt.hf import weights
from ngpt.hf.targets import target_of
from ngpt.hf.weights import write_weights

CFG = compose(["experiment=ngpt_tiny", "model.num_layers=1", "model.sz_init=10"])
SIZES = {
    "embedding.word_embeddings.weight": (384, 64),
    "decoder.layers.0.self_attention.linear_qkv.weight": (128, 64),
    "decoder.layers.0.self_attention.linear_proj.weight": (64, 64),
    "decoder.layers.0.self_attention.core_attention.sqk.stored": (64,),
    "decoder.layers.0.self_attn_bda.alpha.stored": (64,),
    "decoder.layers.1.mlp.linear_fc1.weight": (160, 64),
    "decoder.layers.1.mlp.linear_fc1.suv.stored": (160,),
    "decoder.layers.1.mlp.linear_fc2.weight": (64, 160),
    "decoder.layers.1.mlp_bda.alpha.stored": (64,),
    "output_layer.weight": (384, 64),
    "sz.stored": (384,),
}


@pytest.fixture
def saved(tmp_path) -> tuple[CheckpointTensors, dict[str, torch.Tensor]]:
    """A checkpoint of bf16 weights with fp32 scales and masters, and what it holds."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, size in SIZES.items():
        state[MASTER_PREFIX + key] = torch.randn(size, generator=generator)
        state[key] = state[MASTER_PREFIX + key].to(torch.float32 if "stored" in key else torch.bfloat16)
    return CheckpointTensors(save(state, tmp_path / "iter_0000001")), state


def save(state: dict[str, torch.Tensor], folder: Path) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def written(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_masters_are_written_as_they_are(saved, tmp_path):
    source, state = saved
    told = write_weights(source, CFG.model, target_of(CFG), tmp_path, torch.float32, fold=False)
    found = written(tmp_path)
    assert torch.equal(found["lm_head.weight"], state[MASTER_PREFIX + "output_layer.weight"][:257])
    assert torch.equal(found["logit_scale"], state["sz.stored"][:257])
    assert torch.equal(found["model.layers.1.mixer.down_proj.weight"], state[MASTER_PREFIX + "decoder.layers.1.mlp.linear_fc2.weight"])
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert told.parameters == sum(tensor.numel() for tensor in found.values()) and told.bytes == 4 * told.parameters


def test_the_trained_copy_keeps_its_scales_in_fp32(saved, tmp_path):
    source, state = saved
    write_weights(source, CFG.model, target_of(CFG), tmp_path, torch.bfloat16, fold=False)
    found = written(tmp_path)
    assert torch.equal(found["model.layers.1.mixer.up_proj.weight"], state["decoder.layers.1.mlp.linear_fc1.weight"])
    assert {name for name, tensor in found.items() if tensor.dtype is torch.float32} == {
        *(f"model.layers.{layer}.alpha" for layer in (0, 1)),
        "model.layers.0.mixer.sqk",
        "model.layers.1.mixer.suv",
        "logit_scale",
    }


def test_a_folded_scale_multiplies_the_rows_of_the_output_matrix(saved, tmp_path):
    source, state = saved
    write_weights(source, CFG.model, target_of(CFG, fold_logit_scale=True), tmp_path, torch.float32, fold=True)
    found = written(tmp_path)
    scale = state["sz.stored"].double() * 10 * 64**0.5
    expected = scale[:257, None] * state[MASTER_PREFIX + "output_layer.weight"].double()[:257]
    assert "logit_scale" not in found
    torch.testing.assert_close(found["lm_head.weight"].double(), expected, rtol=2**-22, atol=0)  # two roundings to fp32


def test_files_are_cut_between_tensors_and_indexed(saved, tmp_path, monkeypatch):
    source, _ = saved
    monkeypatch.setattr(weights, "FILE_BYTES", 40_000)
    write_weights(source, CFG.model, target_of(CFG), tmp_path, torch.float32, fold=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 50_000 or len(safe_open(path, "pt").keys()) == 1 for path in files)
    for path in files:
        with safe_open(path, "pt") as file:
            assert all(index["weight_map"][name] == path.name for name in file.keys())  # noqa: SIM118
    assert index["weight_map"].keys() == written(tmp_path).keys()


def test_a_checkpoint_without_masters_is_told_from_one_with(saved, tmp_path):
    _, state = saved
    bare = save({key: state[key] for key in SIZES}, tmp_path / "iter_0000002")
    with pytest.raises(ConfigError, match="no fp32 master of embedding.*--dtype bfloat16"):
        write_weights(CheckpointTensors(bare), CFG.model, target_of(CFG), tmp_path, torch.float32, fold=False)


def test_a_damaged_shard_and_a_missing_tensor_are_named(saved, tmp_path):
    source, state = saved
    with pytest.raises(ConfigError, match=r"no decoder\.layers\.7"):
        source.read("decoder.layers.7.mlp.linear_fc1.weight")
    shard = next(source.folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ConfigError, match=f"{shard.name}.*unreadable"):
        for key in SIZES:
            source.read(key)
