"""The functions f of the activations, each with its derivative: (f(v), f'(v)), written once for both backends.

v is a tensor of torch or of Triton: only operators and methods that both have. NaN stays NaN.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.nn import functional as F


def squared_relu(v):
    r = v * (v > 0)
    return r * r, 2 * r


def silu(v):
    s = v.sigmoid()
    return v * s, s * (1 + v * (1 - s))


def gelu_tanh(v):
    """Source: arXiv 1606.08415 section 2; (1 + tanh(x)) / 2 is sigmoid(2 x)."""
    c = 1.5957691216057308  # 2 sqrt(2 / pi)
    s = (c * v * (1 + 0.044715 * v * v)).sigmoid()
    return v * s, s * (1 + c * v * (1 + 0.134145 * v * v) * (1 - s))


FUNCTIONS: dict[str, Callable[[Any], tuple[Any, Any]]] = {f.__name__: f for f in (squared_relu, silu, gelu_tanh)}
# torch's own of them, for the control's MLPs where Megatron has no argument for the activation
TORCH: dict[str, Callable] = {"gelu_tanh": partial(F.gelu, approximate="tanh")}
