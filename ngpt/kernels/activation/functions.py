"""The functions f of the activations, each with its derivative: (f(v), f'(v)), written once for both backends.

v is a tensor of torch or of Triton: only operators and methods that both have. NaN stays NaN.
"""

from collections.abc import Callable
from typing import Any


def squared_relu(v):
    r = v * (v > 0)
    return r * r, 2 * r


def silu(v):
    s = v.sigmoid()
    return v * s, s * (1 + v * (1 - s))


FUNCTIONS: dict[str, Callable[[Any], tuple[Any, Any]]] = {f.__name__: f for f in (squared_relu, silu)}
TORCH: dict[str, Callable] = {}  # torch's own of them, for the control's MLPs where Megatron has no argument for the activation
