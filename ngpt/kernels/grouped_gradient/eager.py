"""The formula in plain torch: the path of a CPU, of fp32 and of fp64; what the kernel is compared with."""

from torch import Tensor


def add_gradients(total_ENK: Tensor, dy_TN: Tensor, x_TK: Tensor, ends: Tensor) -> None:
    """As the package says, in the total's dtype. On CUDA the host waits for `ends`."""
    begin = 0
    for total_NK, end in zip(total_ENK, ends.tolist(), strict=True):
        if begin < end:
            total_NK.addmm_(dy_TN[begin:end].t().to(total_NK.dtype), x_TK[begin:end].to(total_NK.dtype))
        begin = end
