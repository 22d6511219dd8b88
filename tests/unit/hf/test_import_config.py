"""From config.json to a model of ours: the inverse of every target, and what is refused."""

import dataclasses
import json
import math

import pytest

from ngpt.config import ConfigError, compose, config_dir
from ngpt.config.activations import ACTIVATIONS
from ngpt.config.identity import diff, function_defining
from ngpt.config.schema import ModelConfig
from ngpt.hf.targets import completed, floor_of_steps, model_from, target_of

# Recipes of precision share their models with the bf16 ones.
EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml") if "nvfp4" not in path.stem)
OF_THE_WEIGHTS = {"model.moe_expert_bias"}  # read off the weights
NOT_SAID = {"model.vocab_padding_multiple"}
MORE = (
    "experiment=ngpt_hybrid_tiny model.layer_pattern=ME*E-/*E/*E model.moe_router_normalized=true model.mamba_gated_norm=true",
    "experiment=ngpt_hybrid_tiny model.moe_router_input=unit model.moe_suv=shared model.moe_score=softmax model.moe_expert_bias=false",
    "experiment=ngpt_tiny model.sz_init=10",
    "experiment=ngpt_tiny model.rope_base=500000 model.fine_grained=false model.tied_embeddings=true model.norm_epsilon=1e-6",
    "experiment=gpt_tiny model.activation=swiglu model.tied_embeddings=true model.norm_epsilon=1e-6 model.rope_base=500000",
    "experiment=gpt_hybrid_tiny model.moe_top_k=1 model.init_std=0.01",
    "experiment=gpt_tiny model.position_embedding=none",
    *(f"experiment=gpt_tiny model.activation={name}" for name in ACTIVATIONS),
)


@pytest.mark.parametrize("overrides", [*(f"experiment={name}" for name in EXPERIMENTS), *MORE])
def test_the_way_back_gives_the_same_function(overrides):
    cfg = compose(overrides.split())
    for in_tree in (True, False):
        target = target_of(cfg, in_tree=in_tree)
        fields = model_from(json.loads(json.dumps(target.config)))
        assert fields.keys() <= {field.name for field in dataclasses.fields(ModelConfig)}
        back = dataclasses.replace(cfg, model=ModelConfig(**fields))
        changes = diff(function_defining(cfg), function_defining(back))
        assert changes.keys() <= OF_THE_WEIGHTS | NOT_SAID
        assert fields["init_std"] == cfg.model.init_std and isinstance(fields.get("rope_base", 0), int)


LLAMA = target_of(compose(["experiment=gpt_tiny", "model.activation=swiglu"])).config
ARCEE = target_of(compose(["experiment=gpt_tiny"])).config
NEMOTRON_H = target_of(compose(["experiment=gpt_hybrid_tiny"])).config
NGPT = target_of(compose(["experiment=ngpt_tiny"])).config
REFUSED = {
    "another class": (LLAMA, {"model_type": "qwen3"}, "model_type: qwen3. Only ngpt, llama, arcee, nemotron_h"),
    "no class": (LLAMA, {"model_type": None}, "model_type: None"),
    "quantised": (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "biases of attention": (LLAMA, {"attention_bias": True}, "attention_bias: True.*attention_bias=False"),
    "biases of MLPs": (ARCEE, {"mlp_bias": True}, "mlp_bias: True"),
    "another activation": (LLAMA, {"hidden_act": "gelu"}, "hidden_act: gelu.*hidden_act=silu"),
    "scaled positions": (
        LLAMA,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_parameters.rope_type: linear.*default",
    ),
    "scaled positions in old words": (
        {key: value for key, value in LLAMA.items() if key != "rope_parameters"},
        {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_parameters.rope_type: dynamic",
    ),
    "a broken base": (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}}, "rope_theta: 10000.5"),
    "dropout": (LLAMA, {"attention_dropout": 0.1}, "attention_dropout: 0.1"),
    "a window": (NEMOTRON_H, {"sliding_window": 128}, "sliding_window: 128"),
    "routing by groups": (NEMOTRON_H, {"n_group": 2}, "n_group: 2"),
    "latent experts": (NEMOTRON_H, {"moe_latent_size": 32}, "moe_latent_size: 32"),
    "no shared expert": (NEMOTRON_H, {"moe_shared_expert_intermediate_size": 0}, "moe_shared_expert_intermediate_size: 0"),
    "scores that are not divided by their sum": (NEMOTRON_H, {"norm_topk_prob": False}, "norm_topk_prob: False.*norm_topk_prob=True"),
    "Mamba's biases": (NEMOTRON_H, {"use_bias": True}, "use_bias: True"),
    "no bias of the convolution": (NEMOTRON_H, {"use_conv_bias": False}, "use_conv_bias: False"),
    "another epsilon": (NEMOTRON_H, {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon: 1e-06"),
    "bounded time steps": (NEMOTRON_H, {"time_step_limit": [0.01, 1.0]}, r"time_step_limit: \[0.01, 1.0\]"),
    "prediction depths that the class leaves out": (NEMOTRON_H, {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers: 1"),
    "an activation without a gate of ours": (NGPT, {"hidden_act": "silu"}, "hidden_act: silu.*hidden_act=relu2"),
    "a folded scale": (NGPT, {"logit_scale": False}, "logit_scale: False.*its import is refused: not bitwise.*--fold-logit-scale"),
    "what the class refuses": (NGPT, {"layer_pattern": "*x"}, "config.json: .*NGPTConfig"),
}


@pytest.mark.parametrize("activation", ["squared_relu", "swiglu"])
def test_folders_from_before_hidden_act_name_the_activation_as_the_config_does(activation):
    now = target_of(compose(["experiment=ngpt_tiny", f"model.activation={activation}"])).config
    earlier = {key: value for key, value in now.items() if key not in ("hidden_act", "gated_mlp")} | {"activation": activation}
    assert model_from(earlier) == model_from(now)


@pytest.mark.parametrize("case", REFUSED)
def test_what_our_model_cannot_compute_is_refused_in_one_line(case):
    config, change, told = REFUSED[case]
    with pytest.raises(ConfigError, match=told) as refusal:
        model_from(config | change)
    assert "\n" not in str(refusal.value)


def test_released_folders_say_the_same_in_other_words():
    """Keys of Llama's and Nemotron-H's published folders, from before transformers 5."""
    old = {key: value for key, value in LLAMA.items() if key not in ("rope_parameters", "head_dim", "attention_dropout")}
    assert model_from(old | {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16"}) == model_from(LLAMA)
    told = {key: value for key, value in NEMOTRON_H.items() if key not in ("time_step_min", "sliding_window", "use_conv_bias")}
    assert model_from(told | {"num_hidden_layers": 5, "auto_map": {"AutoConfig": "x.Y"}}) == model_from(NEMOTRON_H)


def test_transformers_nemotron_h_is_told_to_leave_time_steps_alone():
    """Its default raises every step to 0.001; trained ones are smaller, too."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    mixer = NemotronHForCausalLM(NemotronHConfig(**NEMOTRON_H)).model.layers[0].mixer
    assert mixer.time_step_limit[0] < 1e-20 and mixer.time_step_limit[1] == math.inf
    assert floor_of_steps(completed(NEMOTRON_H, "")) is None
    released = {key: value for key, value in NEMOTRON_H.items() if key != "time_step_min"}
    assert floor_of_steps(completed(released, "")) == 0.001
    assert floor_of_steps(completed(LLAMA, "")) is None
