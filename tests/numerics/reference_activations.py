"""The activations from their definitions alone: what everything that computes one is compared with."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """An activation, by its name in the config.

    Attributes:
        gated: f(gate) * up of two halves; otherwise f(u).
        f: of a tensor, any dtype; gradients flow.
        by_hand: f of one number, written without torch.
    """

    gated: bool
    f: Callable[[Tensor], Tensor]
    by_hand: Callable[[float], float]


def _inner[T: (float, Tensor)](gate: T) -> T:
    """Of GELU's tanh."""
    return math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)


ACTIVATIONS = {
    "squared_relu": Reference(False, lambda u: u.clamp(min=0) ** 2, lambda u: max(0.0, u) ** 2),
    "swiglu": Reference(True, lambda gate: gate * gate.sigmoid(), lambda gate: gate / (1 + math.exp(-gate))),
    "geglu": Reference(True, lambda gate: gate * (1 + _inner(gate).tanh()) / 2, lambda gate: gate * (1 + math.tanh(_inner(gate))) / 2),
}
