"""What each kind of layer costs: parameters, FLOPs, memory, kernels and communication; a file for each."""

from collections.abc import Mapping

from ngpt.estimate.kinds.attention import Attention
from ngpt.estimate.kinds.base import LayerEstimate
from ngpt.estimate.kinds.experts import Experts
from ngpt.estimate.kinds.mamba import Mamba
from ngpt.estimate.kinds.mlp import Mlp

KINDS: Mapping[str, LayerEstimate] = {"*": Attention(), "-": Mlp(), "M": Mamba(), "E": Experts()}
