"""Which class of transformers a model is exported to, and its config.json.

nGPT has code of its own, `modeling_ngpt.py`, which is written beside the weights. The GPT controls go to a class that transformers ships
wherever one computes exactly the same function, and otherwise to the same code.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ngpt.config.activations import ACTIVATIONS
from ngpt.config.pattern import parse
from ngpt.config.schema import Config, ModelConfig

MIXER_NORM_EPSILON = 1e-5  # of Mamba's gated norm: megatron-core 0.19.2, MambaMixer

# transformers 5.24.0, NemotronHMamba2Mixer clamps its time steps from below at the config's time_step_min, which is 1e-3 by default. The
# trainer clamps nothing, and neither does this; the logarithm of 0 would break the class's initialisation.
NO_CLAMP = 1e-30


@dataclass(frozen=True)
class Target:
    """A class of transformers.

    Attributes:
        config: config.json, without the type of the weights.
        remote_code: whether the folder needs our code.
        rename: a name of `modeling_ngpt.py` -> the name in this class; None where it has no such tensor.
    """

    config: dict[str, Any]
    remote_code: bool
    rename: Callable[[str], str | None]

    @property
    def name(self) -> str:
        return self.config["architectures"][0]


def target_of(cfg: Config, eod_id: int | None = None, fold_logit_scale: bool = False, in_tree: bool = True) -> Target:
    """The class for a model.

    Args:
        cfg: resolved.
        eod_id: the token that begins, ends and pads documents; None: unknown.
        fold_logit_scale: the logits' scale is part of the output matrix.
        in_tree: controls go to classes of transformers where one fits.
    """
    common = _common(cfg, eod_id, fold_logit_scale)
    fitting = next(_in_tree(cfg), None) if in_tree else None
    if fitting is not None:
        return Target(common | fitting.config, False, fitting.rename)
    return Target(common | _own(cfg.model, fold_logit_scale), True, lambda name: name)


def _common(cfg: Config, eod_id: int | None, fold_logit_scale: bool) -> dict[str, Any]:
    model = cfg.model
    return dict(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        max_position_embeddings=cfg.train.seq_length,
        initializer_range=model.init_std,
        tie_word_embeddings=model.tied_embeddings and not fold_logit_scale,
        bos_token_id=eod_id,
        eos_token_id=eod_id,
        pad_token_id=eod_id,
    )


def _own(model: ModelConfig, fold_logit_scale: bool) -> dict[str, Any]:
    pattern = parse(model.layer_pattern)
    return dict(
        architectures=["NGPTForCausalLM"],
        model_type="ngpt",
        auto_map={
            "AutoConfig": "configuration_ngpt.NGPTConfig",
            "AutoModel": "modeling_ngpt.NGPTModel",
            "AutoModelForCausalLM": "modeling_ngpt.NGPTForCausalLM",
        },
        architecture=model.architecture,
        layer_pattern=pattern.trunk,
        activation=model.activation,
        rope_theta=float(model.rope_base) if model.position_embedding == "rope" else None,
        rms_norm_eps=model.norm_epsilon,
        fine_grained=model.fine_grained,
        alpha_init=model.alpha_init,
        n_routed_experts=model.num_experts,
        num_experts_per_tok=model.moe_top_k,
        moe_intermediate_size=model.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.moe_shared_ffn_hidden_size,
        router_score=model.moe_score,
        routed_scaling_factor=model.moe_scaling,
        router_input=model.moe_router_input if model.architecture == "ngpt" else "unit",
        shared_suv=model.moe_suv == "shared",
        mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim,
        ssm_state_size=model.mamba_state_dim,
        n_groups=model.mamba_num_groups,
        conv_kernel=model.mamba_conv_kernel,
        chunk_size=model.mamba_chunk_size,
        mamba_gated_norm=model.architecture == "gpt" or model.mamba_gated_norm,
        logit_scale=model.architecture == "ngpt" and not fold_logit_scale,
        num_nextn_predict_layers=len(pattern.depths),
        mtp_layer_pattern=pattern.depths[0] if pattern.depths else None,
    )


def _in_tree(cfg: Config) -> Iterator[Target]:
    """Classes of transformers that compute the same function."""
    model, pattern = cfg.model, parse(cfg.model.layer_pattern)
    if model.architecture != "gpt":
        return
    gated = ACTIVATIONS[model.activation].gated
    pairs = pattern.trunk == "*-" * (len(pattern.trunk) // 2)
    if pairs and model.position_embedding == "rope" and model.hidden_size % model.num_attention_heads == 0:
        yield Target(_dense(model, gated), False, _dense_name)
    experts_fit = "E" not in pattern.trunk or (model.moe_score == "sigmoid" and model.moe_shared_ffn_hidden_size > 0)
    if model.position_embedding == "none" and not gated and experts_fit and model.norm_epsilon == MIXER_NORM_EPSILON:
        yield Target(_nemotron_h(model, pattern.trunk), False, lambda name: None if name.startswith("mtp.") else name)


def _dense(model: ModelConfig, gated: bool) -> dict[str, Any]:
    return dict(
        architectures=["LlamaForCausalLM" if gated else "ArceeForCausalLM"],
        model_type="llama" if gated else "arcee",
        num_hidden_layers=len(parse(model.layer_pattern).trunk) // 2,
        hidden_act="silu" if gated else "relu2",
        rms_norm_eps=model.norm_epsilon,
        rope_parameters=dict(rope_type="default", rope_theta=float(model.rope_base)),
        attention_bias=False,
        mlp_bias=False,
    )


def _nemotron_h(model: ModelConfig, trunk: str) -> dict[str, Any]:
    config = dict(
        architectures=["NemotronHForCausalLM"],
        model_type="nemotron_h",
        hybrid_override_pattern=trunk,
        mlp_hidden_act="relu2",
        layer_norm_epsilon=model.norm_epsilon,
        num_nextn_predict_layers=0,
    )
    if "E" in trunk:
        config |= dict(
            n_routed_experts=model.num_experts,
            num_experts_per_tok=model.moe_top_k,
            moe_intermediate_size=model.moe_ffn_hidden_size,
            moe_shared_expert_intermediate_size=model.moe_shared_ffn_hidden_size,
            routed_scaling_factor=model.moe_scaling,
            norm_topk_prob=model.moe_top_k > 1,
            n_group=1,
            topk_group=1,
        )
    if "M" in trunk:
        config |= dict(
            mamba_num_heads=model.mamba_num_heads,
            mamba_head_dim=model.mamba_head_dim,
            ssm_state_size=model.mamba_state_dim,
            n_groups=model.mamba_num_groups,
            conv_kernel=model.mamba_conv_kernel,
            chunk_size=model.mamba_chunk_size,
            time_step_min=NO_CLAMP,
        )
    return config


_DENSE_NAMES = {"model.embeddings.weight": "model.embed_tokens.weight", "model.norm_f.weight": "model.norm.weight"}


def _dense_name(name: str) -> str | None:
    """An attention and the MLP behind it are one layer there."""
    if name.startswith("mtp."):
        return None
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(norm|mixer)\.(.+)", name)
    if layer is None:
        return _DENSE_NAMES.get(name, name)
    number, part, rest = int(layer[1]), layer[2], layer[3]
    is_mlp = number % 2 == 1
    place = {"norm": ("input_layernorm", "post_attention_layernorm"), "mixer": ("self_attn", "mlp")}[part][is_mlp]
    return f"model.layers.{number // 2}.{place}.{rest}"
