"""The mathematics of nGPT on plain tensors: normalisation, the residual step, rotary positions, scale parameters, the loss."""

from ngpt.functional.cross_entropy import scaled_cross_entropy
from ngpt.functional.normalize import EPSILON, l2_normalize, lerp_retract, scaled_l2_normalize
from ngpt.functional.rotary import split_heads
from ngpt.functional.scale import ScaledParameter, scale_features, scale_groups, scale_tokens

__all__ = [
    "EPSILON",
    "ScaledParameter",
    "l2_normalize",
    "lerp_retract",
    "scale_features",
    "scale_groups",
    "scale_tokens",
    "scaled_cross_entropy",
    "scaled_l2_normalize",
    "split_heads",
]
