"""Which class of transformers a model goes to, and under which names."""

import pytest

from ngpt.config import compose
from ngpt.hf.targets import target_of

# Every in-tree class computes one function: a control that differs from it in one option keeps our own code.
CLASSES = {
    "experiment=gpt_tiny": "ArceeForCausalLM",
    "experiment=gpt_tiny model.activation=swiglu": "LlamaForCausalLM",
    "experiment=gpt_tiny model.position_embedding=none": "NemotronHForCausalLM",
    "experiment=gpt_tiny model.position_embedding=none model.norm_epsilon=1e-6": "NGPTForCausalLM",
    "experiment=gpt_tiny model.position_embedding=none model.activation=swiglu": "NGPTForCausalLM",
    "experiment=gpt_hybrid_tiny": "NemotronHForCausalLM",
    "experiment=gpt_hybrid_tiny model.position_embedding=rope": "NGPTForCausalLM",
    "experiment=gpt_hybrid_tiny model.moe_score=softmax model.moe_expert_bias=false": "NGPTForCausalLM",
    "experiment=gpt_hybrid_tiny model.moe_shared_ffn_hidden_size=0": "NGPTForCausalLM",
    "experiment=gpt_hybrid_tiny model.activation=swiglu": "NGPTForCausalLM",
    "experiment=ngpt_tiny": "NGPTForCausalLM",
    "experiment=ngpt_hybrid_tiny": "NGPTForCausalLM",
}


@pytest.mark.parametrize("overrides", CLASSES)
def test_a_model_goes_to_the_class_that_computes_it(overrides):
    target = target_of(compose(overrides.split()))
    assert target.name == CLASSES[overrides]
    assert target.remote_code == ("auto_map" in target.config) == (target.name == "NGPTForCausalLM")


def test_a_control_keeps_our_code_where_that_is_asked_for():
    target = target_of(compose(["experiment=gpt_tiny"]), in_tree=False)
    assert target.name == "NGPTForCausalLM" and target.config["architecture"] == "gpt"


def test_an_attention_and_its_mlp_are_one_layer_of_llama():
    rename = target_of(compose(["experiment=gpt_tiny"])).rename
    names = {
        "model.embeddings.weight": "model.embed_tokens.weight",
        "model.layers.2.norm.weight": "model.layers.1.input_layernorm.weight",
        "model.layers.2.mixer.o_proj.weight": "model.layers.1.self_attn.o_proj.weight",
        "model.layers.3.norm.weight": "model.layers.1.post_attention_layernorm.weight",
        "model.layers.3.mixer.down_proj.weight": "model.layers.1.mlp.down_proj.weight",
        "model.norm_f.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        "mtp.layers.0.eh_proj.weight": None,
    }
    assert {name: rename(name) for name in names} == names


def test_a_folded_scale_unties_the_embedding_and_leaves_the_config():
    cfg = compose(["experiment=ngpt_tiny", "model.tied_embeddings=true"])
    assert target_of(cfg).config["tie_word_embeddings"] and target_of(cfg).config["logit_scale"]
    folded = target_of(cfg, fold_logit_scale=True).config
    assert not folded["tie_word_embeddings"] and not folded["logit_scale"]
