"""Which class of transformers a model is exported to, its config.json, and the model of ours that a config.json describes.

nGPT has code of its own, `modeling_ngpt.py`, which is written beside the weights. The GPT controls go to a class that transformers ships
wherever one computes exactly the same function, and otherwise to our code, too. Both directions read the same tables.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ngpt.config.activations import ACTIVATIONS
from ngpt.config.errors import ConfigError
from ngpt.config.pattern import parse
from ngpt.config.schema import Config, ModelConfig

CODE = ("configuration_ngpt.py", "modeling_ngpt.py")  # of this folder, beside exported weights
MIXER_NORM_EPSILON = 1e-5  # of Mamba's gated norm: megatron-core 0.19.2, MambaMixer
# transformers' Nemotron-H raises Mamba's time steps to `time_step_min` (5.24.0, NemotronHMamba2Mixer), which Megatron does not.
SMALLEST_STEP = 1e-30  # not 0, because its logarithm is taken where weights are drawn

# Key of config.json -> field of `ModelConfig` with the same value.
COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "head_dim",
    "initializer_range": "init_std",
}
EXPERTS = {
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "moe_top_k",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "moe_shared_ffn_hidden_size",
    "routed_scaling_factor": "moe_scaling",
}
MAMBA = {
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "ssm_state_size": "mamba_state_dim",
    "n_groups": "mamba_num_groups",
    "conv_kernel": "mamba_conv_kernel",
    "chunk_size": "mamba_chunk_size",
}
OWN = (
    EXPERTS
    | MAMBA
    | {
        "architecture": "architecture",
        "rms_norm_eps": "norm_epsilon",
        "fine_grained": "fine_grained",
        "alpha_init": "alpha_init",
        "sz_init": "sz_init",
        "router_score": "moe_score",
    }
)
OWN_OF_NGPT = {
    "router_input": "moe_router_input",
    "router_normalized": "moe_router_normalized",
    "mamba_gated_norm": "mamba_gated_norm",
}
DENSE = {"rms_norm_eps": "norm_epsilon"}
NEMOTRON_H = {"layer_norm_epsilon": "norm_epsilon"}


@dataclass(frozen=True)
class InTree:
    """A class of transformers that computes some of our controls.

    Attributes:
        gated: whether its MLPs have a gate.
        act: the key of its config.json that names their function.
        fixed: other keys, with the values for which it computes them. An export writes them, an import requires them.
    """

    name: str
    gated: bool
    act: str
    fixed: Mapping[str, Any]

    def written(self, activation: str) -> dict[str, Any]:
        """What config.json says of it for one of our activations."""
        return {self.act: ACTIVATIONS[activation].hidden_act} | dict(self.fixed)


_NO_BIAS = dict(attention_bias=False, mlp_bias=False, attention_dropout=0.0)
CLASSES = {
    "llama": InTree("LlamaForCausalLM", True, "hidden_act", _NO_BIAS),
    "arcee": InTree("ArceeForCausalLM", False, "hidden_act", _NO_BIAS),
    "nemotron_h": InTree(
        "NemotronHForCausalLM",
        False,
        "mlp_hidden_act",
        dict(
            mamba_hidden_act="silu",
            **_NO_BIAS,
            use_bias=False,
            mamba_proj_bias=False,
            use_conv_bias=True,
            hidden_dropout=0.0,
            sliding_window=None,
            moe_latent_size=None,
            n_group=1,
            topk_group=1,
            num_nextn_predict_layers=0,
        ),
    ),
}
_SYMBOLS = {"full_attention": "*", "mlp": "-", "linear_attention": "M", "moe": "E"}


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
    config = next(_in_tree(cfg), None) if in_tree else None
    if config is not None:
        return Target(common | config, False, rename_to(config["model_type"]))
    return Target(common | _own(cfg.model, fold_logit_scale), True, rename_to("ngpt"))


def rename_to(model_type: str) -> Callable[[str], str | None]:
    """`Target.rename` of a class."""
    if model_type == "ngpt":
        return lambda name: name
    return (lambda name: None if name.startswith("mtp.") else name) if model_type == "nemotron_h" else _dense_name


def _common(cfg: Config, eod_id: int | None, fold_logit_scale: bool) -> dict[str, Any]:
    return _values(cfg.model, COMMON) | dict(
        max_position_embeddings=cfg.train.seq_length,
        tie_word_embeddings=cfg.model.tied_embeddings and not fold_logit_scale,
        bos_token_id=eod_id,
        eos_token_id=eod_id,
        pad_token_id=eod_id,
    )


def _own(model: ModelConfig, fold_logit_scale: bool) -> dict[str, Any]:
    pattern, is_ngpt = parse(model.layer_pattern), model.architecture == "ngpt"
    return dict(
        architectures=["NGPTForCausalLM"],
        model_type="ngpt",
        auto_map={
            "AutoConfig": "configuration_ngpt.NGPTConfig",
            "AutoModel": "modeling_ngpt.NGPTModel",
            "AutoModelForCausalLM": "modeling_ngpt.NGPTForCausalLM",
        },
        **_values(model, OWN),
        **(_values(model, OWN_OF_NGPT) if is_ngpt else dict(router_input="unit", mamba_gated_norm=True)),
        hidden_act=ACTIVATIONS[model.activation].hidden_act,
        gated_mlp=ACTIVATIONS[model.activation].gated,
        layer_pattern=pattern.trunk,
        rope_theta=float(model.rope_base) if model.position_embedding == "rope" else None,
        shared_suv=model.moe_suv == "shared",
        logit_scale=is_ngpt and not fold_logit_scale,
        num_nextn_predict_layers=len(pattern.depths),
        mtp_layer_pattern=pattern.depths[0] if pattern.depths else None,
    )


def _in_tree(cfg: Config) -> Iterator[dict[str, Any]]:
    """Further keys in config.json of those classes of transformers that compute the same function."""
    model, pattern = cfg.model, parse(cfg.model.layer_pattern)
    if model.architecture != "gpt":
        return
    gated = ACTIVATIONS[model.activation].gated
    pairs = pattern.trunk == "*-" * (len(pattern.trunk) // 2)
    if pairs and model.position_embedding == "rope" and model.hidden_size % model.num_attention_heads == 0:
        yield _dense(model, gated)
    experts_fit = "E" not in pattern.trunk or (model.moe_score == "sigmoid" and model.moe_shared_ffn_hidden_size > 0)
    if model.position_embedding == "none" and not gated and experts_fit and model.norm_epsilon == MIXER_NORM_EPSILON:
        yield _nemotron_h(model, pattern.trunk)


def _dense(model: ModelConfig, gated: bool) -> dict[str, Any]:
    model_type = "llama" if gated else "arcee"
    return dict(
        architectures=[CLASSES[model_type].name],
        model_type=model_type,
        num_hidden_layers=len(parse(model.layer_pattern).trunk) // 2,
        rope_parameters=dict(rope_type="default", rope_theta=float(model.rope_base)),
        **_values(model, DENSE),
        **CLASSES[model_type].written(model.activation),
    )


def _nemotron_h(model: ModelConfig, trunk: str) -> dict[str, Any]:
    config = dict(
        architectures=[CLASSES["nemotron_h"].name],
        model_type="nemotron_h",
        hybrid_override_pattern=trunk,
        time_step_min=SMALLEST_STEP,
        **_values(model, NEMOTRON_H),
        **CLASSES["nemotron_h"].written(model.activation),
    )
    if "E" in trunk:
        config |= _values(model, EXPERTS) | dict(norm_topk_prob=model.moe_top_k > 1)
    if "M" in trunk:
        config |= _values(model, MAMBA)
    return config


def _values(model: ModelConfig, table: Mapping[str, str]) -> dict[str, Any]:
    return {key: getattr(model, name) for key, name in table.items()}


def model_from(config: Mapping[str, Any], path: str = "config.json") -> dict[str, Any]:
    """The model of ours that computes what a config.json describes.

    Args:
        config: its content. path: where it was read, for messages.

    Returns:
        Fields of `ModelConfig`. What config.json does not say is not among them.

    Raises:
        ConfigError: it is of another class, or says what our model cannot do.
    """
    model_type = config.get("model_type")
    if model_type != "ngpt" and model_type not in CLASSES:
        rule = f"Only {', '.join(['ngpt', *CLASSES])} have a model of ours that computes the same"
        raise ConfigError(f"{path}: model_type", model_type, rule, "Import a folder of one of these classes")
    if config.get("quantization_config"):
        raise ConfigError(f"{path}: quantization_config", "quantised weights", "Weights are imported as they are", "Name the bf16 folder")
    whole = completed(config, path)
    fields = {name: whole[key] for key, name in COMMON.items()} | {"tied_embeddings": bool(whole["tie_word_embeddings"])}
    return fields | (_of_own(whole, path) if model_type == "ngpt" else _of_in_tree(whole, path))


def completed(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A config.json with the defaults of its class, and in the words of transformers' present version.

    Raises:
        ConfigError: the class does not take it.
    """
    from transformers import CONFIG_MAPPING  # takes seconds

    from ngpt.hf.configuration_ngpt import NGPTConfig

    config_class = NGPTConfig if config["model_type"] == "ngpt" else CONFIG_MAPPING[config["model_type"]]
    try:
        made = config_class.from_dict({key: value for key, value in config.items() if key != "auto_map"})
    except Exception as error:  # transformers' checks raise errors of their own
        raise ConfigError(path, error, f"{config_class.__name__} of transformers must take it", "Restore the file") from error
    return made.to_dict()


def _of_own(config: dict[str, Any], path: str) -> dict[str, Any]:
    is_ngpt = config["architecture"] == "ngpt"
    if is_ngpt and not config["logit_scale"]:
        rule = "The logits' scale was folded into the output matrix: its import is refused: not bitwise"
        raise ConfigError(f"{path}: logit_scale", False, rule, "Export the run again without --fold-logit-scale")
    fields = {name: config[key] for key, name in OWN.items()} | {"activation": _activation(config, "hidden_act", config["gated_mlp"], path)}
    if is_ngpt:
        fields |= {name: config[key] for key, name in OWN_OF_NGPT.items()}
        fields["moe_suv"] = "shared" if config["shared_suv"] else "per_expert"
    pattern = config["layer_pattern"] + f"/{config['mtp_layer_pattern']}" * config["num_nextn_predict_layers"]
    return fields | _layers(pattern) | _positions(config["rope_theta"], f"{path}: rope_theta")


def _of_in_tree(config: dict[str, Any], path: str) -> dict[str, Any]:
    model_type = config["model_type"]
    in_tree = CLASSES[model_type]
    for key, wanted in in_tree.fixed.items():
        if config.get(key, wanted) != wanted:
            raise _unfit(path, key, config[key], wanted)
    fields = {"architecture": "gpt", "activation": _activation(config, in_tree.act, in_tree.gated, path)}
    if model_type != "nemotron_h":
        fields |= {name: config[key] for key, name in DENSE.items()} | _layers("*-" * config["num_hidden_layers"])
        rope = config["rope_parameters"]
        if rope.get("rope_type", "default") != "default":
            raise _unfit(path, "rope_parameters.rope_type", rope["rope_type"], "default")
        return fields | _positions(rope["rope_theta"], f"{path}: rope_parameters.rope_theta")
    pattern = "".join(_SYMBOLS[kind] for kind in config["layers_block_type"])
    fields |= {name: config[key] for key, name in NEMOTRON_H.items()} | _layers(pattern) | {"position_embedding": "none"}
    if "M" in pattern:
        fields |= {name: config[key] for key, name in MAMBA.items()}
        if config["layer_norm_epsilon"] != MIXER_NORM_EPSILON:
            raise _unfit(path, "layer_norm_epsilon", config["layer_norm_epsilon"], MIXER_NORM_EPSILON)
        if (limit := tuple(config["time_step_limit"])) != (0.0, math.inf):
            raise _unfit(path, "time_step_limit", list(limit), "[0, Infinity]")
    if "E" in pattern:
        fields |= {name: config[key] for key, name in EXPERTS.items()} | {"moe_score": "sigmoid"}
        if not config["moe_shared_expert_intermediate_size"]:  # otherwise the class would take intermediate_size
            raise _unfit(path, "moe_shared_expert_intermediate_size", 0, "WIDTH")
        if config["norm_topk_prob"] != (config["num_experts_per_tok"] > 1):
            raise _unfit(path, "norm_topk_prob", config["norm_topk_prob"], config["num_experts_per_tok"] > 1)
    return fields


def _activation(config: Mapping[str, Any], key: str, gated: bool, path: str) -> str:
    """The activation of ours with this function, by transformers' name, and with a gate or without."""
    known = {activation.hidden_act: name for name, activation in ACTIVATIONS.items() if activation.gated == gated}
    if config[key] not in known:
        raise _unfit(path, key, config[key], " or ".join(known))
    return known[config[key]]


def floor_of_steps(config: Mapping[str, Any]) -> float | None:
    """What transformers' class raises Mamba's time steps to, where it does. Megatron, in which such models are trained, never does."""
    is_hybrid = config["model_type"] == "nemotron_h" and "linear_attention" in config["layers_block_type"]
    return config["time_step_min"] if is_hybrid and config["time_step_min"] > SMALLEST_STEP else None


def _layers(pattern: str) -> dict[str, Any]:
    return {"layer_pattern": pattern, "num_layers": len(parse(pattern).blocks)}


def _positions(rope_theta: float | None, path: str) -> dict[str, Any]:
    if rope_theta is None:
        return {"position_embedding": "none"}
    if rope_theta != int(rope_theta):
        raise ConfigError(path, rope_theta, "model.rope_base is a whole number", "Import a model whose base is one")
    return {"position_embedding": "rope", "rope_base": int(rope_theta)}


def _unfit(path: str, key: str, got: Any, wanted: Any) -> ConfigError:
    rule = f"Our model computes what the class does with {key}={wanted} only"
    return ConfigError(f"{path}: {key}", got, rule, f"Import a model that was trained with {key}={wanted}")


_DENSE_NAMES = {"model.embeddings.weight": "model.embed_tokens.weight", "model.norm_f.weight": "model.norm.weight"}


def _dense_name(name: str) -> str | None:
    """There, an attention and the MLP behind it are one layer."""
    if name.startswith("mtp."):
        return None
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(norm|mixer)\.(.+)", name)
    if layer is None:
        return _DENSE_NAMES.get(name, name)
    number, part, rest = int(layer[1]), layer[2], layer[3]
    is_mlp = number % 2 == 1
    place = {"norm": ("input_layernorm", "post_attention_layernorm"), "mixer": ("self_attn", "mlp")}[part][is_mlp]
    return f"model.layers.{number // 2}.{place}.{rest}"
