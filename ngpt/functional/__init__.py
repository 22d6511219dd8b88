"""The mathematics of nGPT on plain tensors: normalisation, the residual step, heads, scale parameters, activations, the loss."""

from ngpt.functional.activation import scaled_activation
from ngpt.functional.cross_entropy import scaled_cross_entropy
from ngpt.functional.normalize import EPSILON, l2_normalize, lerp_retract
from ngpt.functional.rotary import split_heads
from ngpt.functional.scale import ScaledParameter, scale_features, scale_tokens

__all__ = [
    "EPSILON",
    "ScaledParameter",
    "l2_normalize",
    "lerp_retract",
    "scale_features",
    "scale_tokens",
    "scaled_activation",
    "scaled_cross_entropy",
    "split_heads",
]
