"""Exact parameter counts of a model and the training FLOPs of a token. Uses the config alone, no torch."""

from dataclasses import dataclass

from ngpt.config.schema import ModelConfig
from ngpt.config.sizes import padded_vocab_size


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by place. Scales and norm weights count where they live; a tied head counts once, as the embedding."""

    embedding: int
    head: int  # the output layer; 0 when tied
    logit_scale: int  # nGPT's sz
    final_norm: int  # the control's
    attention: int  # all attention sub-blocks
    mlp: int  # all MLP sub-blocks
    matmul: int  # weights that multiply each token: every matrix but the embedding's look-up; a tied head is among them
    padding: int  # part of the embedding, head and logit scale that only pads the vocabulary

    @property
    def blocks(self) -> int:
        return self.attention + self.mlp

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.logit_scale + self.final_norm + self.blocks

    @property
    def total_without_padding(self) -> int:
        return self.total - self.padding


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Counts the trained numbers of a resolved model config, vocabulary padding included."""
    ngpt = model.architecture == "ngpt"
    hidden, vocab = model.hidden_size, padded_vocab_size(model)
    attention_layers, mlp_layers = model.layer_pattern.count("*"), model.layer_pattern.count("-")
    attention_matrices, mlp_matrices = _attention_matrices(model), _mlp_matrices(model)
    # nGPT: alpha [D] and sqk [N*K]; alpha [D] and suv [F] or [2F]. Control: the weight [D] of the RMSNorm before the sub-block.
    attention_scales = hidden + (model.num_attention_heads * model.head_dim if ngpt else 0)
    mlp_scales = hidden + (_fc1_width(model) if ngpt else 0)
    rows_per_token = hidden * (1 if model.tied_embeddings else 2) + (1 if ngpt else 0)
    return ParameterCounts(
        embedding=vocab * hidden,
        head=0 if model.tied_embeddings else vocab * hidden,
        logit_scale=vocab if ngpt else 0,
        final_norm=0 if ngpt else hidden,
        attention=attention_layers * (attention_matrices + attention_scales),
        mlp=mlp_layers * (mlp_matrices + mlp_scales),
        matmul=attention_layers * attention_matrices + mlp_layers * mlp_matrices + vocab * hidden,
        padding=(vocab - model.vocab_size) * rows_per_token,
    )


def training_flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """FLOPs of forward and backward for one token, the numerator of MFU.

    6 for each weight that multiplies the token, and for each attention layer 6 * S * N * K: 12 * S * N * K for its two products,
    halved because a causal token sees half the sequence on average. Recomputed work does not count.
    """
    attention = model.layer_pattern.count("*") * seq_length * model.num_attention_heads * model.head_dim
    return 6 * (count_parameters(model).matmul + attention)


def _attention_matrices(model: ModelConfig) -> int:
    queries, keys = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    return model.hidden_size * (queries + 2 * keys) + queries * model.hidden_size


def _mlp_matrices(model: ModelConfig) -> int:
    return model.hidden_size * (_fc1_width(model) + model.ffn_hidden_size)


def _fc1_width(model: ModelConfig) -> int:
    return model.ffn_hidden_size * (2 if model.activation == "swiglu" else 1)
