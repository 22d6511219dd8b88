"""Transformer Engine's NVFP4 quantisers, and one that takes its global amax from this project.

Imported only where Transformer Engine is: see te_recipes.py. File names are Transformer Engine's, as of 2.20.2.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformer_engine.common.recipe import CustomRecipe
from transformer_engine.pytorch import cpp_extensions as tex
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.quantized_tensor import Quantizer
from transformer_engine.pytorch.tensor.identity_tensor import IdentityQuantizer
from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

from ngpt.precision.quantize import round_up_to_pow2_scale
from ngpt.recipes import BLOCK, QuantizerSpec


def quantizer_of(spec: QuantizerSpec | None) -> Quantizer:
    """A new quantiser for one operand slot; None keeps the operand in its dtype."""
    if spec is None:
        return IdentityQuantizer()
    return nvfp4_quantizer(spec) if spec.global_amax == "dynamic" else GivenAmaxQuantizer(spec)


def nvfp4_quantizer(spec: QuantizerSpec) -> NVFP4Quantizer:
    """Transformer Engine's quantiser with this block shape, transform and rounding; its own amax is the dynamic one.

    Stochastic rounding draws from torch's default generator of the device (csrc/quantizer.cpp: quantize_impl), so its numbers repeat on
    ranks that are seeded alike.
    """
    return NVFP4Quantizer(
        fp4_dtype=DType.kFloat4E2M1,
        rowwise=True,
        columnwise=True,
        with_amax_reduction=False,
        amax_reduction_group=None,
        with_rht=spec.rht != "off",
        with_post_rht_amax=spec.rht != "off",
        with_2d_quantization=spec.block_shape == (BLOCK, BLOCK),
        stochastic_rounding=spec.rounding == "sr",
        row_scaled_nvfp4=False,
        nvfp4_use_4over6=False,
        nvfp4_e4m3_max=448,
        nvfp4_4over6_err_mode="MAE",
        with_random_sign_mask=spec.rht != "unsigned",
    )


class GivenAmaxQuantizer(Quantizer):
    """NVFP4 by Transformer Engine's kernels with a static amax, or a dynamic one rounded up to 1.3125 * 2^j.

    The result is an ordinary NVFP4 tensor, so the GEMMs are native ones. The kernels are reached through a quantiser of exactly the
    class NVFP4Quantizer, which C++ asks for (csrc/pybind.h compares the type): a subclass would not pass.

    Attributes:
        custom: makes Linear gather tokens in high precision under sequence parallelism and quantise the gathered tensor, with one amax;
            quantised parts could only be gathered with an NVFP4Quantizer (distributed.py: gather_along_first_dim). There is no
            `with_amax_reduction`, so Linear asks for no all-reduce of the amax either.
    """

    custom = True

    def __init__(self, spec: QuantizerSpec, *, rowwise: bool = True, columnwise: bool = True):
        super().__init__(rowwise=rowwise, columnwise=columnwise)
        self.spec = spec
        self.kernels = nvfp4_quantizer(spec)

    def quantize_impl(self, tensor: Tensor) -> Tensor:
        """The NVFP4 tensor in the directions asked for with `set_usage`; dimensions must be multiples of 16."""
        (quantized,) = self._quantize([tensor], self._amax(tensor))
        if not self.internal:
            # quantize_() of the result asks its own quantiser, which would be the plain one and measure the amax.
            quantized._quantizer = self.copy()
        return quantized

    def quantize_parts(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        """`quantize_impl` of x's consecutive rows, cut into parts of these sizes (not all 0). All amaxes are rounded at once."""
        if self.spec.global_amax == "static":
            amaxes = self._static_amax(x, len(sizes))
        else:
            of_rows = torch.linalg.vector_norm(x, math.inf, dim=1, dtype=torch.float32)
            amaxes = round_up_to_pow2_scale(torch.stack([rows.amax() for rows in of_rows.split(sizes)]))
        return self._quantize(x.split(sizes), amaxes)

    def _quantize(self, tensors: Sequence[Tensor], amaxes: Tensor) -> list[Tensor]:
        self.kernels.set_usage(rowwise=self.rowwise_usage, columnwise=self.columnwise_usage)
        self.kernels.internal, self.kernels.optimize_for_gemm = self.internal, self.optimize_for_gemm
        # Results hold these very tensors, and clear() empties them (nvfp4_tensor_storage.py), so they are new every time.
        both = zip(tensors, amaxes.split(1), amaxes.clone().split(1), strict=True)
        return [tex.nvfp4_quantize_with_amax(tensor, self.kernels, row, column) for tensor, row, column in both]

    def _amax(self, tensor: Tensor) -> Tensor:
        """fp32 [1] on the tensor's device, without waiting for it."""
        if self.spec.global_amax == "static":
            return self._static_amax(tensor, 1)
        if tensor.numel() == 0:
            return torch.zeros(1, dtype=torch.float32, device=tensor.device)
        amax = torch.linalg.vector_norm(tensor, math.inf, dtype=torch.float32)  # one pass; NaN propagates
        return round_up_to_pow2_scale(amax.view(1))

    def _static_amax(self, like: Tensor, number: int) -> Tensor:
        return torch.full((number,), self.spec.static_amax, dtype=torch.float32, device=like.device)

    def update_quantized(self, src: Tensor, dst: Tensor, *, noop_flag: Tensor | None = None) -> Tensor:
        """Quantise `src` into the buffers of `dst`, a tensor this quantiser made."""
        if noop_flag is not None:
            raise NotImplementedError("noop_flag (weight caching in CUDA graphs) with a given NVFP4 amax. Train without CUDA graphs.")
        fresh = self.copy()
        fresh.internal = True
        fresh.set_usage(rowwise=dst._rowwise_data is not None, columnwise=dst._columnwise_data is not None)
        dst.copy_from_storage(fresh.quantize_impl(src))
        return dst

    def copy(self) -> "GivenAmaxQuantizer":
        """A quantiser with the same options and flags."""
        copy = GivenAmaxQuantizer(self.spec, rowwise=self.rowwise_usage, columnwise=self.columnwise_usage)
        copy.internal, copy.optimize_for_gemm = self.internal, self.optimize_for_gemm
        return copy

    def is_requantization_safe(self) -> bool:
        """Whether a second quantisation gives the same result, so that Linear may keep the original tensor instead."""
        return self.spec.rounding == "rtne"

    def _get_compatible_recipe(self) -> type[CustomRecipe]:
        return CustomRecipe
