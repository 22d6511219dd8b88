"""The weight gradients of all experts of a layer, added in fp32 to where they are kept, in one launch.

bf16 and fp16 on CUDA go through a Triton kernel, others through plain torch. Parallelism: experts and rows of this rank alone.
"""

import torch
from torch import Tensor

from ngpt.kernels.grouped_gradient import eager
from ngpt.kernels.rows import kernels_take

__all__ = ["add_gradients"]


def add_gradients(total_ENK: Tensor, dy_TN: Tensor, x_TK: Tensor, ends: Tensor) -> None:
    """total[e] += dy_e^T x_e for every group e of rows, ends[e - 1] .. ends[e] of dy and x; fp32 sums, the same bits every time.

    A group without rows leaves its total alone. On CUDA nothing waits: the kernel reads `ends` on the device, unchecked.

    Args:
        total_ENK: fp32 [experts, N, K] contiguous, such as a view of Megatron's gradient buffer; fp64 for fp64.
        dy_TN, x_TK: gradients of the experts' outputs, and their inputs, of one dtype; rows from the last end on are not read.
        ends: int32 [experts] on the same device: where each group of rows ends; never decreasing, at most T.

    Raises:
        ValueError: shapes or the dtype of `ends` do not fit, or the total is not contiguous.
    """
    if total_ENK.shape != (ends.size(0), dy_TN.size(1), x_TK.size(1)) or dy_TN.size(0) != x_TK.size(0) or ends.dtype != torch.int32:
        raise ValueError(
            f"add_gradients: total {tuple(total_ENK.shape)}, dy {tuple(dy_TN.shape)}, x {tuple(x_TK.shape)}, {ends.dtype} ends "
            f"{tuple(ends.shape)}; they must be [E, N, K], [T, N], [T, K] and torch.int32 [E]. Pass what one layer's experts have."
        )
    if not total_ENK.is_contiguous():
        raise ValueError(f"add_gradients: total has strides {total_ENK.stride()}, but must be contiguous. Pass a view of one buffer.")
    if dy_TN.numel() and x_TK.numel():
        _backend(total_ENK, dy_TN, x_TK, ends).add_gradients(total_ENK, dy_TN, x_TK, ends)


def _backend(total_ENK: Tensor, dy_TN: Tensor, x_TK: Tensor, ends: Tensor):
    fits = dy_TN.dtype == x_TK.dtype != torch.float32 and ends.device == dy_TN.device
    if not (fits and kernels_take(dy_TN, x_TK, fp32=(total_ENK,))):
        return eager
    from ngpt.kernels.grouped_gradient import triton  # here, since triton may be missing where there is no CUDA

    return triton
