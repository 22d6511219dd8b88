"""The configuration of an nGPT model, or of its GPT control, as config.json holds it."""

from transformers import PreTrainedConfig

# What transformers' cache holds for a layer, in its words: nothing for "moe", the one such name that its check of configs lets pass.
LAYER_TYPES = {"*": "full_attention", "-": "moe", "M": "linear_attention", "E": "moe"}
CHOICES = {
    "architecture": ("ngpt", "gpt"),
    "router_score": ("sigmoid", "softmax"),
    "router_input": ("scaled", "unit"),
}
EARLIER = {"squared_relu": ("relu2", False), "swiglu": ("silu", True)}  # `activation` of earlier folders: hidden_act, gated_mlp


class NGPTConfig(PreTrainedConfig):
    """What defines the function of the model.

    Args:
        architecture: "ngpt", matrices and hidden states of unit norm, or "gpt", the control with RMSNorms and additive residuals.
        layer_pattern: a symbol a layer: * attention, - MLP, M Mamba-2, E mixture of experts.
        hidden_act: function of MLPs and experts, by transformers' name. gated_mlp: it applies to a gate beside the up projection, and
            multiplies that.
        rope_theta: base of the rotary positions; None: positions show in the causal mask alone.
        rms_norm_eps: of the control's norms. Mamba's gated norm has a constant of its own.
        fine_grained: nGPT: the input of every output projection has unit norm.
        alpha_init: nGPT: the residual steps (eigen learning rates) that training started from; scales the stored ones.
        sz_init: nGPT: the scale of the logits that training started from; scales the stored ones.
        n_routed_experts, num_experts_per_tok, moe_intermediate_size, moe_shared_expert_intermediate_size: of expert layers. The last is the
            width of the expert that sees every token; 0: there is none.
        router_score: each expert's own (sigmoid) or over all experts (softmax), taken before the selection.
        routed_scaling_factor: of the selected scores. Where several are selected, they are first divided by their sum.
        router_input: nGPT: the router reads sqrt(D) * h ("scaled") or h ("unit").
        router_normalized: nGPT: the router's rows have unit norm, too. Only training needs to know.
        shared_suv: nGPT: the routed experts of a layer share their scales.
        mamba_num_heads, mamba_head_dim, ssm_state_size, n_groups, conv_kernel: of Mamba-2 layers. chunk_size: tokens of a piece of
            the scan.
        mamba_gated_norm: nGPT: the RMSNorm after Mamba's gate is there. The control always has it.
        logit_scale: nGPT: logits have a trained scale each; False where it was folded into lm_head.
        num_nextn_predict_layers, mtp_layer_pattern: depths of multi-token prediction whose weights lie under mtp.* in the weight files, and
            the layers of each. The model does not load them.
        initializer_range: standard deviation of random weights, before nGPT's get unit norm.

    Raises:
        ValueError: a value that a field does not take.
    """

    model_type = "ngpt"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    architecture: str = "ngpt"
    layer_pattern: str = "*-*-"
    vocab_size: int = 131072
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    hidden_act: str = "relu2"
    gated_mlp: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float | None = 10_000.0
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    fine_grained: bool = True
    alpha_init: float = 0.05
    sz_init: float = 1.0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    router_score: str = "sigmoid"
    routed_scaling_factor: float = 1.0
    router_input: str = "scaled"
    router_normalized: bool = False
    shared_suv: bool = False
    mamba_num_heads: int = 0
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    chunk_size: int = 128
    mamba_gated_norm: bool = False
    logit_scale: bool = True
    num_nextn_predict_layers: int = 0
    mtp_layer_pattern: str = ""
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        if earlier := kwargs.pop("activation", None):
            self.hidden_act, self.gated_mlp = EARLIER[earlier]
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if not self.layer_pattern or set(self.layer_pattern) - set(LAYER_TYPES):
            raise ValueError(f"layer_pattern: {self.layer_pattern!r} must be made of the symbols {' '.join(LAYER_TYPES)}")
        super().__post_init__(**kwargs)
        if not self.is_ngpt:
            # nGPT has no such plan: its norms and scales run over features that a plan would split.
            self.base_model_tp_plan = {
                f"layers.*.mixer.{prefix}{name}_proj": style
                for prefix, names in (("", "qkvo"), ("", ("gate", "up", "down")), ("shared_experts.", ("gate", "up", "down")))
                for name, style in ((name, "rowwise" if name in ("o", "down") else "colwise") for name in names)
            }

    @property
    def is_ngpt(self) -> bool:
        return self.architecture == "ngpt"

    @property
    def normalizes_operands(self) -> bool:
        """Whether the inputs of output projections get unit norm."""
        return self.is_ngpt and self.fine_grained

    @property
    def has_mixer_norm(self) -> bool:
        """Whether Mamba-2 layers have an RMSNorm after their gate."""
        return self.mamba_gated_norm or not self.is_ngpt

    @property
    def has_logit_scale(self) -> bool:
        return self.logit_scale and self.is_ngpt

    @property
    def layer_types(self) -> list[str]:
        """What the cache holds for each layer. It counts tokens in its first attention layer, or without one in the layer `counter`."""
        types = [LAYER_TYPES[symbol] for symbol in self.layer_pattern]
        if self.counter is not None:
            types[self.counter] = "hybrid"
        return types

    @property
    def counter(self) -> int | None:
        return None if "*" in self.layer_pattern else max(self.layer_pattern.find("M"), 0)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_pattern)


NGPTConfig.register_for_auto_class()
