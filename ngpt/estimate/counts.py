"""Exact parameter counts of a model and the training FLOPs of a token. Uses the config alone, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from ngpt.config.layers import LAYERS
from ngpt.config.pattern import parse
from ngpt.config.schema import ModelConfig
from ngpt.config.sizes import padded_vocab_size
from ngpt.estimate.kinds import KINDS
from ngpt.estimate.kinds.base import LayerCount, is_ngpt


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by place. Scales and norm weights count where they live; a tied head counts once, as the embedding."""

    embedding: int
    head: int  # the output layer; 0 when tied
    logit_scale: int  # nGPT's sz
    final_norm: int  # the control's
    layers: Mapping[str, int]  # all of the model's own layers of each kind, by its symbol; 0 where there are none
    prediction: int  # all of the multi-token prediction depths: projections, norms and layers, counted in no other field
    matmul: int  # weights that multiply each token: every matrix but the embedding's look-up; the head once for each prediction
    idle: int  # parameters of the routed experts that a token does not see
    padding: int  # part of the embedding, head and logit scale that only pads the vocabulary

    @property
    def blocks(self) -> int:
        """The model's own layers, of every kind."""
        return sum(self.layers.values())

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.logit_scale + self.final_norm + self.blocks + self.prediction

    @property
    def active(self) -> int:
        """What one token uses: `total` without the experts that it is not sent to."""
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

    return ParameterCounts(
        embedding=vocab * hidden,
        head=0 if model.tied_embeddings else vocab * hidden,
        logit_scale=vocab if ngpt else 0,
        final_norm=0 if ngpt else hidden,
        layers={symbol: sum(counted[symbol].total for each in pattern.trunk if each == symbol) for symbol in LAYERS},
        prediction=sum(join.total for join in joins) + sum(counted[symbol].total for depth in pattern.depths for symbol in depth),
        matmul=sum(counted[symbol].matmul for symbol in pattern.layers)
        + sum(join.matmul for join in joins)
        + (1 + len(joins)) * vocab * hidden,
        idle=sum(counted[symbol].idle for symbol in pattern.layers),
        padding=(vocab - model.vocab_size) * rows_per_token,
    )


def count_layer(model: ModelConfig, symbol: str) -> LayerCount:
    """Counts one layer of the layer pattern. nGPT: alpha [D] in each; the control: the weight [D] of the RMSNorm before it."""
    count = KINDS[symbol].count(model)
    return LayerCount(count.matrices, count.matmul, count.others + model.hidden_size, count.idle)


def count_join(model: ModelConfig) -> LayerCount:
    """Counts what a multi-token prediction depth has besides its layers: the projection [D, 2 * D], and the control's three RMSNorms."""
    matrices = 2 * model.hidden_size**2
    return LayerCount(matrices, matrices, others=0 if is_ngpt(model) else 3 * model.hidden_size)


def training_flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """FLOPs of forward and backward for one token, the numerator of MFU.

    6 for each weight that multiplies the token, plus what attention and Mamba's scans compute without weights (`layer_flops`).
    A multi-token prediction depth adds its layers, its projection and one more product with the head. Recomputed work does not count.
    """
    return 6 * count_parameters(model).matmul + sum(layer_flops(model, symbol, seq_length) for symbol in LAYERS)


def layer_flops(model: ModelConfig, symbol: str, seq_length: int) -> int:
    """FLOPs of forward and backward for one token, without those of weights, in all layers of a kind, prediction depths included."""
    number = parse(model.layer_pattern).layers.count(symbol)
    return number * KINDS[symbol].flops(model, seq_length) if number else 0
