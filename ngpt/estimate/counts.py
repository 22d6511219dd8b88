"""Exact parameter counts of a model and the training FLOPs of a token. Uses the config alone, no torch."""

from dataclasses import dataclass

from ngpt.config.activations import ACTIVATIONS
from ngpt.config.pattern import parse
from ngpt.config.schema import ModelConfig
from ngpt.config.sizes import padded_vocab_size


@dataclass(frozen=True)
class LayerCount:
    """Trained numbers of one layer.

    Attributes:
        matrices: weights of its linear layers and router, all experts.
        matmul: those that multiply each token: of the routed experts only the selected ones.
        others: scales, norm weights, and Mamba's convolution, decay rates, skip weights and step biases.
        idle: weights and scales of the routed experts that a token does not see.
    """

    matrices: int
    matmul: int
    others: int
    idle: int = 0

    @property
    def total(self) -> int:
        return self.matrices + self.others


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by place. Scales and norm weights count where they live; a tied head counts once, as the embedding."""

    embedding: int
    head: int  # the output layer; 0 when tied
    logit_scale: int  # nGPT's sz
    final_norm: int  # the control's
    blocks: int  # the model's own layers, of every symbol; the next four are parts of it
    attention: int  # all attention sub-blocks
    mlp: int  # all MLP sub-blocks
    mamba: int  # all Mamba sub-blocks
    moe: int  # all mixture-of-experts sub-blocks, with router and shared expert
    prediction: int  # all of the multi-token prediction depths: projections, norms and layers, which are in none of the others
    matmul: int  # weights that multiply each token: every matrix but the embedding's look-up; the head once for each prediction
    idle: int  # parameters of the routed experts that a token does not see
    padding: int  # part of the embedding, head and logit scale that only pads the vocabulary

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.logit_scale + self.final_norm + self.blocks + self.prediction

    @property
    def active(self) -> int:
        """What one token makes use of: `total` without the experts that it is not sent to."""
        return self.total - self.idle

    @property
    def total_without_padding(self) -> int:
        return self.total - self.padding


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Counts the trained numbers of a resolved model config, vocabulary padding included."""
    ngpt = model.architecture == "ngpt"
    hidden, vocab = model.hidden_size, padded_vocab_size(model)
    pattern = parse(model.layer_pattern)
    counted = {symbol: count_layer(model, symbol) for symbol in set(pattern.layers)}
    joins = [count_join(model) for _ in pattern.depths]
    rows_per_token = hidden * (1 if model.tied_embeddings else 2) + (1 if ngpt else 0)

    def all_of(symbol: str) -> int:
        return pattern.trunk.count(symbol) * counted[symbol].total if symbol in pattern.trunk else 0

    return ParameterCounts(
        embedding=vocab * hidden,
        head=0 if model.tied_embeddings else vocab * hidden,
        logit_scale=vocab if ngpt else 0,
        final_norm=0 if ngpt else hidden,
        blocks=sum(counted[symbol].total for symbol in pattern.trunk),
        attention=all_of("*"),
        mlp=all_of("-"),
        mamba=all_of("M"),
        moe=all_of("E"),
        prediction=sum(join.total for join in joins) + sum(counted[symbol].total for depth in pattern.depths for symbol in depth),
        matmul=sum(counted[symbol].matmul for symbol in pattern.layers)
        + sum(join.matmul for join in joins)
        + (1 + len(joins)) * vocab * hidden,
        idle=sum(counted[symbol].idle for symbol in pattern.layers),
        padding=(vocab - model.vocab_size) * rows_per_token,
    )


def count_layer(model: ModelConfig, symbol: str) -> LayerCount:
    """Counts one layer of the layer pattern. nGPT: alpha [D] in each; the control: the weight [D] of the RMSNorm before it."""
    count = _LAYERS[symbol](model)
    return LayerCount(count.matrices, count.matmul, count.others + model.hidden_size, count.idle)


def count_join(model: ModelConfig) -> LayerCount:
    """Counts what a multi-token prediction depth has besides its layers: the projection [D, 2 * D], and the control's three RMSNorms."""
    matrices = 2 * model.hidden_size**2
    return LayerCount(matrices, matrices, others=0 if _is_ngpt(model) else 3 * model.hidden_size)


def training_flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """FLOPs of forward and backward for one token, the numerator of MFU.

    6 for each weight that multiplies the token; for each attention layer 6 * S * N * K: 12 * S * N * K for its two products,
    halved because a causal token sees half the sequence on average; for each Mamba layer 3 times the forward work of `mamba_scan_flops`.
    A multi-token prediction depth adds its layers, its projection and one more product with the head. Recomputed work does not count.
    """
    layers = parse(model.layer_pattern).layers
    attention = layers.count("*") * seq_length * model.num_attention_heads * model.head_dim
    scans = layers.count("M") * mamba_scan_flops(model)
    return 6 * (count_parameters(model).matmul + attention) + 3 * scans


def mamba_scan_flops(model: ModelConfig) -> int:
    """Forward FLOPs of one token in one Mamba layer's convolution and scan, cut into chunks of Q tokens.

    Within a chunk (causal: Q/2 tokens on average): C . B for each group, 2 * N, and the weighted sum of the inputs, 2 * P a head.
    Across chunks: adding to the state and reading it, 2 * P * N a head each. Convolution: 2 a tap and feature.

    Source: Mamba-2, arXiv 2405.21060 section 6.
    """
    heads, head_dim, state, groups = model.mamba_num_heads, model.mamba_head_dim, model.mamba_state_dim, model.mamba_num_groups
    seen = model.mamba_chunk_size // 2
    within = seen * (groups * 2 * state + heads * 2 * head_dim)
    across = 2 * heads * 2 * head_dim * state
    return within + across + 2 * model.mamba_conv_kernel * _conv_features(model)


def _attention(model: ModelConfig) -> LayerCount:
    queries, keys = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    matrices = model.hidden_size * (queries + 2 * keys) + queries * model.hidden_size
    return LayerCount(matrices, matrices, others=queries if _is_ngpt(model) else 0)  # sqk


def _mlp(model: ModelConfig) -> LayerCount:
    matrices = _mlp_matrices(model, model.ffn_hidden_size)
    return LayerCount(matrices, matrices, others=_suv(model, model.ffn_hidden_size))


def _moe(model: ModelConfig) -> LayerCount:
    expert, suv = _mlp_matrices(model, model.moe_ffn_hidden_size), _suv(model, model.moe_ffn_hidden_size)
    shared, shared_suv = _mlp_matrices(model, model.moe_shared_ffn_hidden_size), _suv(model, model.moe_shared_ffn_hidden_size)
    router, idle = model.num_experts * model.hidden_size, model.num_experts - model.moe_top_k
    per_expert = model.moe_suv == "per_expert"
    return LayerCount(
        matrices=model.num_experts * expert + shared + router,
        matmul=model.moe_top_k * expert + shared + router,
        others=(model.num_experts if per_expert else 1) * suv + shared_suv,
        idle=idle * (expert + (suv if per_expert else 0)),
    )


def _mamba(model: ModelConfig) -> LayerCount:
    heads, inner = model.mamba_num_heads, model.mamba_num_heads * model.mamba_head_dim
    in_proj = inner + _conv_features(model) + heads  # z; x, B, C; dt
    matrices = model.hidden_size * (in_proj + inner)
    return LayerCount(matrices, matrices, others=mixer_numbers(model) + (in_proj if _is_ngpt(model) else 0))  # mixer_in_scale


def mixer_numbers(model: ModelConfig) -> int:
    """What a Mamba mixer trains besides matrices and nGPT's scale: convolution with bias; A_log, D, dt_bias; the gated norm."""
    norm = model.mamba_num_heads * model.mamba_head_dim if has_gated_norm(model) else 0
    return _conv_features(model) * (model.mamba_conv_kernel + 1) + 3 * model.mamba_num_heads + norm


def has_gated_norm(model: ModelConfig) -> bool:
    """Whether Mamba's RMSNorm after the gate is there."""
    return not _is_ngpt(model) or model.mamba_gated_norm


_LAYERS = {"*": _attention, "-": _mlp, "E": _moe, "M": _mamba}


def _is_ngpt(model: ModelConfig) -> bool:
    return model.architecture == "ngpt"


def _mlp_matrices(model: ModelConfig, ffn: int) -> int:
    return model.hidden_size * (_fc1_width(model, ffn) + ffn)


def _suv(model: ModelConfig, ffn: int) -> int:
    return _fc1_width(model, ffn) if _is_ngpt(model) else 0


def _fc1_width(model: ModelConfig, ffn: int) -> int:
    return ffn * ACTIVATIONS[model.activation].gate_and_up


def _conv_features(model: ModelConfig) -> int:
    """x, B and C."""
    return model.mamba_num_heads * model.mamba_head_dim + 2 * model.mamba_num_groups * model.mamba_state_dim
