"""Compile the experts' weight gradients for GPUs that need not be there: `python compile_grouped_gradient.py CAPABILITY...`."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ngpt.kernels.grouped_gradient.kernels import add_kernel
from ngpt.kernels.grouped_gradient.triton import EDGE, ROWS, STAGES, WARPS

KINDS = {"total_ptr": "*fp32", "dy_ptr": "*bf16", "x_ptr": "*bf16", "ends_ptr": "*i32", "n_units": "i32", "k_units": "i32"}


def compiled(capability: int):
    """The compiled kernel for totals whose edges are multiples of 8."""
    names = add_kernel.arg_names
    constants = dict(UNIT=8, EDGE=EDGE, ROWS=ROWS, STAGES=STAGES)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    signature = {name: KINDS.get(name, "constexpr") for name in names}
    source = ASTSource(add_kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        print(capability, add_kernel.fn.__module__, add_kernel.fn.__name__, len(compiled(capability).asm["cubin"]))
