"""A folder of weights: which forms are read, and what is wrong with one."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ngpt.config import ConfigError, compose
from ngpt.hf.folder import INDEX, WHOLE, Folder
from ngpt.hf.importing import read_source
from ngpt.hf.links import links
from ngpt.hf.targets import target_of

ARCEE = target_of(compose(["experiment=gpt_tiny", "model.num_layers=1"]))
TIED = target_of(compose(["experiment=gpt_tiny", "model.num_layers=1", "model.tied_embeddings=true"]))


def tensors_of(*overrides: str) -> dict[str, torch.Tensor]:
    """Small ones under all names: shapes are the trainer's to judge."""
    cfg = compose(["experiment=gpt_tiny", *overrides])
    names = [target_of(cfg).rename(name) for link in links(cfg.model) for name in link.names]
    return {name: torch.full((2, 2), float(number)) for number, name in enumerate(names)}


TENSORS = tensors_of("model.num_layers=1")


def folder_of(path: Path, tensors: dict[str, torch.Tensor] = TENSORS, config: dict = ARCEE.config) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / WHOLE)
    return path


def read(path: Path, tmp_path: Path):
    return read_source(path, "x", str(tmp_path / "runs"), tmp_path / "conf")


def test_a_whole_folder_gives_a_config_and_says_what_is_a_default(tmp_path):
    source = read(folder_of(tmp_path / "hf"), tmp_path)
    assert source.cfg.run.name == "x" and source.cfg.model.architecture == "gpt" and source.cfg.train.seq_length == 32
    assert source.cfg.tokenizer.path == str(tmp_path / "hf" / "tokenizer.json")
    assert source.names["model.layers.1.mixer.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"
    assert any("model.vocab_padding_multiple=128" in note for note in source.notes)
    assert any("no " in note and "tokenizer.json" in note for note in source.notes)


def test_a_sentencepiece_model_is_found(tmp_path):
    path = folder_of(tmp_path / "hf")
    (path / "tokenizer.model").touch()
    source = read(path, tmp_path)
    assert source.cfg.tokenizer.kind == "sentencepiece" and source.cfg.tokenizer.path == str(path / "tokenizer.model")


def test_missing_and_unknown_tensors_are_named(tmp_path):
    short = {name: tensor for name, tensor in TENSORS.items() if "up_proj" not in name}
    with pytest.raises(ConfigError, match=r"no model\.layers\.0\.mlp\.up_proj\.weight\. "):
        read(folder_of(tmp_path / "short", short), tmp_path)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj\.bias\. .*no such tensor"):
        read(folder_of(tmp_path / "long", TENSORS | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(2)}), tmp_path)
    read(folder_of(tmp_path / "old", TENSORS | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}), tmp_path)


def test_a_tied_matrix_that_is_there_must_be_the_embedding(tmp_path):
    tied = tensors_of("model.num_layers=1", "model.tied_embeddings=true")
    assert "lm_head.weight" not in tied
    read(folder_of(tmp_path / "without", tied, TIED.config), tmp_path)
    read(folder_of(tmp_path / "equal", tied | {"lm_head.weight": tied["model.embed_tokens.weight"].clone()}, TIED.config), tmp_path)
    with pytest.raises(ConfigError, match="lm_head.weight. config.json ties it to model.embed_tokens.weight, and they differ"):
        read(folder_of(tmp_path / "other", tied | {"lm_head.weight": torch.full((2, 2), 7.0)}, TIED.config), tmp_path)
    with pytest.raises(ConfigError, match=r"no lm_head\.weight"):
        read(folder_of(tmp_path / "untied", tied, ARCEE.config), tmp_path)


def test_a_half_written_folder_is_refused(tmp_path):
    path = folder_of(tmp_path / "hf")
    (path / WHOLE).rename(path / "model-00001-of-00002.safetensors")
    index = {name: f"model-0000{1 + (name == 'lm_head.weight')}-of-00002.safetensors" for name in TENSORS}
    (path / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors: missing"):
        Folder(path)
    save_file({"another": torch.zeros(1)}, path / "model-00002-of-00002.safetensors")
    with pytest.raises(ConfigError, match=r"00002\.safetensors: no lm_head\.weight"):
        Folder(path)
    (path / "model-00002-of-00002.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match="whole safetensors file"):
        Folder(path)


def test_what_is_no_folder_of_safetensors_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: missing"):
        Folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="must be JSON"):
        Folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match="pytorch_model.bin. Weights are read from model.safetensors"):
        Folder(tmp_path)


def test_transformers_word_for_infinity_is_a_number(tmp_path):
    path = folder_of(tmp_path / "hf", config={"time_step_limit": [0.0, {"__float__": "Infinity"}], "other": {"a": 1}})
    assert Folder(path).config == {"time_step_limit": [0.0, math.inf], "other": {"a": 1}}


def test_bf16_is_read_exactly_and_what_fp32_does_not_hold_is_refused(tmp_path):
    numbers = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    folder = Folder(folder_of(tmp_path / "hf", {"a": numbers, "b": numbers.double(), "c": numbers.int()}))
    assert torch.equal(folder.read("a"), numbers.float()) and folder.read("a").dtype == torch.float32
    for name, dtype in (("b", "F64"), ("c", "I32")):
        with pytest.raises(ConfigError, match=f"{name} in {dtype}"):
            folder.read(name)
    with pytest.raises(ConfigError, match=r"a has the shape \[5, 3\]. The model of its config.json has \[5, 4\]"):
        folder.check_shape("a", (5, 4))


def test_experts_that_lie_apart_are_one_tensor(tmp_path):
    """As Nemotron-H is published, under backbone. and an expert a tensor, ten and more of them."""
    apart = {f"backbone.layers.1.mixer.experts.{number}.up_proj.weight": torch.full((2, 3), float(number)) for number in range(11)}
    folder = Folder(folder_of(tmp_path / "hf", apart | {"backbone.norm_f.weight": torch.ones(2)}))
    assert folder.names == {"model.layers.1.mixer.experts.up_proj", "model.norm_f.weight"}
    assert folder.shape("model.layers.1.mixer.experts.up_proj") == (11, 2, 3)
    assert folder.read("model.layers.1.mixer.experts.up_proj")[:, 0, 0].tolist() == list(range(11))
    del apart["backbone.layers.1.mixer.experts.4.up_proj.weight"]
    with pytest.raises(ConfigError, match="of 10 experts, not numbered from 0"):
        Folder(folder_of(tmp_path / "hf", apart))
