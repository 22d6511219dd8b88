"""What the row-wise kernels share: which tensors they take, and how rows are dealt out to programs."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

DEVICES = {"cuda"}  # devices whose tensors go through kernels; tests of the interpreter add "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 16384  # the widest row that one program holds in registers
_SHARED_BY_SUMS = 4096  # bytes of shared memory that warps need, at most, to exchange sums


def use_kernels(wanted: bool) -> None:
    """Chooses whether this process runs these kernels on a GPU, or the same mathematics in plain torch."""
    (DEVICES.add if wanted else DEVICES.discard)("cuda")


def kernels_take(*tensors: Tensor, fp32: tuple[Tensor, ...] = ()) -> bool:
    """Whether kernels exist for these activations (`tensors`) and parameters (`fp32`): one device, known dtypes, parameters in fp32."""
    device = tensors[0].device
    if device.type not in DEVICES:
        return False
    for x in tensors:
        if x.dtype not in DTYPES or x.device != device or not x.dim() or not x.numel():
            return False
    for x in fp32:
        if x.dtype != torch.float32 or x.device != device:
            return False
    return tensors[0].numel() // tensors[0].size(-1) < 2**31


def as_rows(x: Tensor) -> Tensor:
    """[rows, width] of a tensor that is not empty. A view where the last dimension is contiguous and all rows are one stride apart."""
    rows = x.reshape(-1, x.size(-1))
    return rows if rows.stride(1) == 1 or rows.size(1) == 1 else rows.contiguous()


def dense_like(x: Tensor) -> Tensor:
    """Uninitialised memory of x's shape and dtype, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Tiling:
    """How a kernel's programs are cut.

    Attributes:
        warps: of a program; a row that is too wide for them gets more.
        elements: of the tile that a thread holds.
        resident: the most warps on a multiprocessor that there are programs for; each program loops over tiles.
        stages: tiles that a program loads ahead, through shared memory; 1: none.
        widest: elements of a wide row that a thread holds before more warps share the row; 0: `elements`.
    """

    warps: int
    elements: int
    resident: int
    stages: int = 1
    widest: int = 0

    def tile(self, width: int) -> tuple[int, int, int]:
        """Rows and columns (both powers of two) and warps of tiles that hold whole rows."""
        columns = power_of_two(width)
        warps = min(16, max(self.warps, columns // (32 * (self.widest or self.elements))))
        return max(1, warps * 32 * self.elements // columns), columns, warps

    def strip(self, width: int) -> tuple[int, int, int]:
        """Rows, columns and warps of tiles that hold part of a row. A thread holds elements of one column, one below the other."""
        columns = min(power_of_two(width), self.warps * 256)
        return max(1, self.warps * 32 * self.elements // columns), columns, self.warps

    def programs(self, warps: int, device: torch.device) -> int:
        """The most programs of this many warps that the device gets."""
        return max(1, self.resident // warps) * _multiprocessors(device)


    def stages_for(self, tile_bytes: int, device: torch.device) -> int:
        """`stages`, or as many as a program's shared memory has room for. All tiles but the current one wait there.

        Args:
            tile_bytes: of everything that a program loads for a tile.
        """
        return min(self.stages, 1 + max(0, _shared_memory(device) - _SHARED_BY_SUMS) // tile_bytes)


def height_of_pieces(rows: int, of_tile: int, most: int) -> int:
    """Rows of a piece, in whole tiles, such that there are about as many pieces as programs allowed."""
    return -(-rows // (most * of_tile)) * of_tile


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 2**40


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
