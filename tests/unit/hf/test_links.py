"""Tensors of a checkpoint and of a Hugging Face model: where each number goes, and that it comes back."""

import pytest
import torch

from ngpt.config import compose
from ngpt.config.schema import ModelConfig
from ngpt.hf.links import Link, links, shapes_of


def model(*overrides: str, experiment: str = "ngpt_hybrid_tiny") -> ModelConfig:
    return compose([f"experiment={experiment}", *(f"model.{override}" for override in overrides)]).model


def link_to(found: ModelConfig, name: str) -> Link:
    return next(link for link in links(found) if name in link.names)


def test_a_group_gives_its_queries_its_key_and_its_value():
    found = model("num_attention_heads=4", "num_query_groups=2", "head_dim=2")
    rows = {"group 0": ["q0", "q0", "q1", "q1", "k0", "k0", "v0", "v0"], "group 1": ["q2", "q2", "q3", "q3", "k1", "k1", "v1", "v1"]}
    order = [*rows["group 0"], *rows["group 1"]]
    mixed = torch.arange(len(order), dtype=torch.float32)[:, None].expand(-1, 3)
    q, k, v = link_to(found, "model.layers.2.mixer.q_proj.weight").to_model([mixed])
    assert [order[int(row)] for row in q[:, 0]] == ["q0", "q0", "q1", "q1", "q2", "q2", "q3", "q3"]
    assert [order[int(row)] for row in k[:, 0]] == ["k0", "k0", "k1", "k1"]
    assert [order[int(row)] for row in v[:, 0]] == ["v0", "v0", "v1", "v1"]


def test_gate_stands_before_up():
    gate_and_up = torch.arange(6.0)[:, None]
    link = link_to(model("activation=swiglu", experiment="ngpt_tiny"), "model.layers.1.mixer.gate_proj.weight")
    assert link.names[1] == "model.layers.1.mixer.up_proj.weight"
    assert [half[:, 0].tolist() for half in link.to_model([gate_and_up])] == [[0, 1, 2], [3, 4, 5]]


def test_rows_that_pad_the_vocabulary_stay_behind():
    link = link_to(model(), "lm_head.weight")
    weight = torch.randn(384, 64, generator=torch.Generator().manual_seed(0))
    (exported,) = link.to_model([weight])
    assert torch.equal(exported, weight[:257])
    (back,) = link.to_checkpoint([exported])
    assert torch.equal(back[:257], exported) and back.shape == (384, 64) and not back[257:].any()


MODELS = {
    "hybrid": model("layer_pattern=ME*E-/*E"),
    "hybrid with one suv for all experts": model("moe_suv=shared", "activation=swiglu", "mamba_gated_norm=true"),
    "dense": model(experiment="ngpt_tiny"),
    "dense, gated, tied": model("activation=swiglu", "tied_embeddings=true", experiment="ngpt_tiny"),
    "hybrid control": model(experiment="gpt_hybrid_tiny"),
    "dense control": model(experiment="gpt_tiny"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_way_back_restores_every_number(name):
    generator = torch.Generator().manual_seed(0)
    for link in links(MODELS[name]):
        if link.missing is not None:
            continue
        sizes = checkpoint_sizes(MODELS[name], link)
        tensors = [torch.randn(size, generator=generator) for size in sizes]
        made = link.to_model(tensors)
        assert [tuple(tensor.shape) for tensor in made] == list(shapes_of(link, dict(zip(link.keys, sizes, strict=True))).values())
        back = link.to_checkpoint([tensor.contiguous() for tensor in made])
        for before, after in zip(tensors, back, strict=True):
            real = 257 if before.size(0) == 384 else before.size(0)
            assert after.shape == before.shape and torch.equal(after[:real], before[:real])


def checkpoint_sizes(found: ModelConfig, link: Link) -> list[tuple[int, ...]]:
    """Shapes in the checkpoint, as far as a link depends on them."""
    inner, states = found.mamba_num_heads * found.mamba_head_dim, found.mamba_num_groups * found.mamba_state_dim
    parts = {"z": inner, "x": inner, "B": states, "C": states, "dt": found.mamba_num_heads}
    queries_keys_values = (found.num_attention_heads + 2 * found.num_query_groups) * found.head_dim
    if len(link.keys) > 1:
        return [(parts[key.rpartition(".")[2]], 3) for key in link.keys]
    if "linear_qkv" in link.keys[0]:
        return [(queries_keys_values, 3)]
    return [(384, 3)] if link.names[0] in ("model.embeddings.weight", "lm_head.weight", "logit_scale") else [(8, 3)]


def test_no_name_and_no_tensor_is_linked_twice():
    for found in MODELS.values():
        keys = [key for link in links(found) for key in link.keys]
        names = [name for link in links(found) for name in link.names]
        assert len(keys) == len(set(keys)) and len(names) == len(set(names))


def test_a_model_without_expert_bias_gets_one_of_zeros():
    link = link_to(model("moe_expert_bias=false"), "model.layers.1.mixer.gate.e_score_correction_bias")
    assert torch.equal(link.missing(), torch.zeros(4))
    assert link_to(model(), "model.layers.1.mixer.gate.e_score_correction_bias").missing is None
