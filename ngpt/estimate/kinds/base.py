"""What an estimate needs to know about one kind of layer, beyond what all have: linears, the residual step, the gather around them.

A number has the model's dtype unless its factor says otherwise. "x" is what enters a layer, D the hidden size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ngpt.config.linears import BlockLinear
from ngpt.config.schema import Config, ModelConfig
from ngpt.estimate.rank import Layer, RankParameters, Tokens, activation_bytes, computes_norm, operand_bytes
from ngpt.estimate.roofline import Work

FP32 = 4
Saved = dict[str, float]  # part of the layer: bytes


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


class LayerEstimate(ABC):
    """One kind of layer, see `ngpt.config.layers`."""

    @abstractmethod
    def count(self, model: ModelConfig) -> LayerCount:
        """The trained numbers of the whole layer, without nGPT's alpha [D] or the control's norm [D] in front of it."""

    def flops(self, model: ModelConfig, seq_length: int) -> int:
        """Training FLOPs of one token, forward and backward, without those of weights."""
        return 0

    @abstractmethod
    def parameters(self, cfg: Config, layer: Layer) -> RankParameters:
        """A rank's part of what the layer has besides its linears and the alpha or norm in front."""

    @abstractmethod
    def saved(self, cfg: Config, layer: Layer, tokens: Tokens) -> Saved:
        """Bytes that the sub-block keeps of a micro-batch for its backward pass, by the part that recomputation may drop."""

    @abstractmethod
    def work(self, cfg: Config, layer: Layer, tokens: Tokens) -> tuple[Work, Work]:
        """What its kernels do besides the products of its linears, forward and backward."""

    def links(self, cfg: Config, layer: Layer, tokens: Tokens) -> tuple[float, float]:
        """Exposed seconds of what it sends within the sub-block, forward and backward."""
        return 0.0, 0.0


def is_ngpt(model: ModelConfig) -> bool:
    """Whether the model has nGPT's scales, and no norms."""
    return model.architecture == "ngpt"


def written_bytes(cfg: Config, layer: Layer, linear: BlockLinear) -> float:
    """Bytes a token that an output projection keeps of its input, including the fine-grained norm where that is computed."""
    size, features = activation_bytes(cfg), linear.in_features
    operand = operand_bytes(cfg, layer.recipes.get(linear.name))
    return features * (size + operand) + FP32 if computes_norm(cfg, layer, linear) else features * operand
