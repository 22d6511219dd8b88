"""Launch the Triton kernel, on CUDA or in Triton's interpreter."""

import functools
from dataclasses import dataclass

from torch import Tensor

from ngpt.kernels.grouped_gradient.kernels import add_kernel
from ngpt.kernels.launch import Launcher


@dataclass(frozen=True)
class Tiling:
    """How the kernel's programs are cut.

    Attributes:
        short, long: edges of a tile of the total; the long one lies along N or K, whichever leaves less of the tiles empty.
        rows: of dy and x at a time.
        warps: of a program.
        stages: blocks of rows in shared memory, those loaded ahead and the one at work.
        peeled, atomic: see the kernel.
    """

    short: int
    long: int
    rows: int
    warps: int
    stages: int
    peeled: bool = False
    atomic: bool = True

    def tile(self, n: int, k: int) -> tuple[int, int]:
        """The tile's edges along N and K."""
        return min((self.short, self.long), (self.long, self.short), key=lambda edges: _whole(n, edges[0]) * _whole(k, edges[1]))


TILING = Tiling(short=128, long=256, rows=64, warps=8, stages=4)  # predicted, not measured: see README.md


def add_gradients(total_ENK: Tensor, dy_TN: Tensor, x_TK: Tensor, ends: Tensor) -> None:
    """As the package says, for operands with elements."""
    experts, n, k = total_ENK.shape
    unit = 8 if n % 8 == k % 8 == 0 else 1
    launch, tiles = _plan(TILING, n, k, unit)
    tensors = total_ENK, dy_TN.contiguous(), x_TK.contiguous(), ends.contiguous()
    launch((tiles, experts, 1), tensors, (n // unit, k // unit))


@functools.cache
def _plan(tiling: Tiling, n: int, k: int, unit: int) -> tuple[Launcher, int]:
    """The launcher, and how many tiles a total has."""
    bn, bk = tiling.tile(n, k)
    return _launcher(tiling, bn, bk, unit), -(-n // bn) * -(-k // bk)


@functools.cache
def _launcher(tiling: Tiling, bn: int, bk: int, unit: int) -> Launcher:
    """One for all sizes that are cut alike."""
    switches = dict(PEELED=tiling.peeled, ATOMIC=tiling.atomic, STAGES=tiling.stages)
    return Launcher(add_kernel, UNIT=unit, BN=bn, BK=bk, R=tiling.rows, **switches, num_warps=tiling.warps)


def _whole(size: int, edge: int) -> int:
    """The size, rounded up to whole tiles."""
    return -(-size // edge) * edge
