"""NVFP4 on plain tensors: number formats, the reference quantiser, the reference GEMM."""

from ngpt.precision.gemm import qgemm
from ngpt.precision.quantize import quantize
from ngpt.precision.tensor import QuantizedTensor
from ngpt.recipes import FourOverSix, QuantizerSpec

__all__ = ["FourOverSix", "QuantizedTensor", "QuantizerSpec", "qgemm", "quantize"]
