"""The activations that an MLP or expert may have. This is the one table of them: all code that depends on the activation reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Activation:
    """What stands between the two linears of an MLP.

    Attributes:
        title: what a model card calls it.
        description: the formula, in one line.
        function: f of the formula, by its name in `ngpt.kernels.activation.functions`.
        hidden_act: f by transformers' name.
        gated: f applies to the first half of fc1's output, the gate, and multiplies the second, up.
        megatron: Megatron arguments, by argparse name, that choose it. Empty: Megatron has none, and its config is given f itself.
        fusion: Megatron's switch of its fused kernel, which takes an expert's router probabilities along; None where there is none.
    """

    title: str
    description: str
    function: str
    hidden_act: str
    gated: bool
    megatron: Mapping[str, Any] = field(default_factory=dict)
    fusion: str | None = None

    @property
    def gate_and_up(self) -> int:
        """How many numbers of fc1's output make one number of fc2's input."""
        return 2 if self.gated else 1


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "squared_relu": Activation(
            "squared ReLU", "max(0, u)^2", "squared_relu", hidden_act="relu2", gated=False, megatron={"squared_relu": True}
        ),
        "swiglu": Activation(
            "SwiGLU", "SiLU(gate) * up", "silu", hidden_act="silu", gated=True, megatron={"swiglu": True}, fusion="bias_swiglu_fusion"
        ),
        "geglu": Activation("GEGLU", "GELU(gate) * up, GELU by its tanh formula", "gelu_tanh", hidden_act="gelu_pytorch_tanh", gated=True),
    }
)
MEGATRON_ARGUMENTS = frozenset(argument for activation in ACTIVATIONS.values() for argument in activation.megatron)
FUSIONS = frozenset(activation.fusion for activation in ACTIVATIONS.values() if activation.fusion)
