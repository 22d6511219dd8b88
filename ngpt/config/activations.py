"""The activations that an MLP or expert may have. The one table of them: everything that depends on which one it is reads it here."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Activation:
    """What stands between the two linears of an MLP.

    Attributes:
        description: one line.
        function: what nGPT's kernel applies, see `ngpt.functional.scaled_activation`.
        gated: it multiplies two halves of fc1's output, gate and up.
        megatron: Megatron arguments, by argparse name, that choose it.
        fusion: Megatron's switch of its fused kernel, which takes an expert's router probabilities along; None where there is none.
    """

    description: str
    function: str
    gated: bool
    megatron: Mapping[str, Any]
    fusion: str | None = None

    @property
    def gate_and_up(self) -> int:
        """How many numbers of fc1's output make one of fc2's input."""
        return 2 if self.gated else 1


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "squared_relu": Activation("max(0, u)^2", "squared_relu", gated=False, megatron={"squared_relu": True}),
        "swiglu": Activation("SiLU(gate) * up", "silu", gated=True, megatron={"swiglu": True}, fusion="bias_swiglu_fusion"),
    }
)
FUSIONS = frozenset(activation.fusion for activation in ACTIVATIONS.values() if activation.fusion)
