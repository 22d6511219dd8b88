"""Launches of Triton kernels at little cost to the host."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel


class Launcher:
    """A kernel with its constants, which remembers what Triton compiled.

    At every launch Triton looks at the type, alignment and value of each argument to find the compiled kernel. On the host this costs
    several times as much as the launch itself. Here tensors that start at a multiple of 16 bytes, as torch allocates them, are told
    apart by their dtypes alone. Other tensors go through Triton.

    Args:
        kernel: a `triton.jit` function of pointers, numbers it does not specialise on, numbers it does, and constants, in this order.
        constants: the constants by name, and options of the compiler, such as `num_warps`.
    """

    def __init__(self, kernel: triton.JITFunction, **constants: object):
        self._kernel, self._options = kernel, constants
        self._constants = [constants[name] for name in kernel.arg_names if name in constants]
        self._compiled: dict[tuple, CompiledKernel] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor | None],
        unspecialized: Sequence[float],
        specialized: tuple[int, ...] = (),
    ) -> None:
        """Launch on the first tensor's device.

        Args:
            tensors: None for a pointer that the kernel does not use.
            unspecialized: the numbers that the kernel is not compiled anew for, each always of one type: integers below 2^31, or below
                2^63 where the kernel annotates them `tl.int64`; floats.
            specialized: integers below 2^31 that it is compiled for: the value 1 and multiples of 16 get kernels of their own.
        """
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        kinds = [-1 if number == 1 else number % 16 == 0 for number in specialized]
        key = (tensors[0].device, *kinds, *[None if tensor is None else tensor.dtype for tensor in tensors])
        with torch.cuda.device_of(tensors[0]):
            compiled = self._compiled.get(key)
            if compiled is not None and _aligned(pointers):
                compiled[grid](*pointers, *unspecialized, *specialized, *self._constants)
                return
            compiled = self._kernel[grid](*tensors, *unspecialized, *specialized, **self._options)
            if isinstance(compiled, CompiledKernel) and _aligned(pointers):  # None in the interpreter
                self._compiled[key] = compiled


def _aligned(pointers: list[int | None]) -> bool:
    together = 0
    for pointer in pointers:
        together |= pointer or 0
    return together % 16 == 0
