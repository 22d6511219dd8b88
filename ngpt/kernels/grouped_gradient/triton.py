"""Launch the Triton kernel, on CUDA or in Triton's interpreter."""

import functools

from torch import Tensor

from ngpt.kernels.grouped_gradient.kernels import add_kernel
from ngpt.kernels.launch import Launcher

EDGE = 128  # of a square tile of the total
ROWS = 64  # of dy and x at a time
WARPS = 4  # of a program
STAGES = 3  # blocks of rows in shared memory: those loaded ahead, and the one at work


def add_gradients(total_ENK: Tensor, dy_TN: Tensor, x_TK: Tensor, ends: Tensor) -> None:
    """As the package says, for operands with elements."""
    experts, n, k = total_ENK.shape
    unit = 8 if n % 8 == k % 8 == 0 else 1
    tensors = total_ENK, dy_TN.contiguous(), x_TK.contiguous(), ends.contiguous()
    _launcher(unit)((-(-n // EDGE) * -(-k // EDGE), experts, 1), tensors, (n // unit, k // unit))


@functools.cache
def _launcher(unit: int) -> Launcher:
    return Launcher(add_kernel, UNIT=unit, EDGE=EDGE, ROWS=ROWS, STAGES=STAGES, num_warps=WARPS)
