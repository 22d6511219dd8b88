"""Compile the quantiser kernels with every option on for GPUs that need not be there: `python compile_nvfp4.py CAPABILITY...`."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ngpt.kernels.nvfp4_quantize import kernels

TILE = {"S": 2, "C": 64, "EVEN": False, "VEC": 4}
DIRECTIONS = {"ROWWISE": True, "COLUMNWISE": True, "SQUARE": False, "AMAX": 2, "RHT": 1, "STOCHASTIC": True}
POINTERS = {"x_ptr": "*bf16", "row_ptr": "*bf16", "column_ptr": "*bf16", "counts_ptr": "*i64", "out_ptr": "*i32", "amax_out_ptr": "*fp32"}
POINTERS |= {"row_codes_ptr": "*i16", "column_codes_ptr": "*i32", "row_scales_ptr": "*u8", "column_scales_ptr": "*u8"}
POINTERS |= {"row_amax_ptr": "*i32", "column_amax_ptr": "*i32"}
SCALARS = {"rows": "i32", "columns": "i32", "seed": "i64", "static_amax": "fp32", "static_encode": "fp32", "static_decode": "fp32"}


def compile_for(capability: int, kernel: triton.JITFunction, switches: dict) -> int:
    """Bytes of machine code."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in switches else (POINTERS | SCALARS)[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in (*POINTERS, "rows", "columns")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in switches.items()}, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return len(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"])


if __name__ == "__main__":
    counts = {"FOLD": True, "COUNT_ROW": True, "COUNT_COLUMN": True}
    cases = ((kernels.amax_kernel, {"RHT": 1}), (kernels.dequantized_kernel, DIRECTIONS | counts), (kernels.packed_kernel, DIRECTIONS))
    for target in map(int, sys.argv[1:]):
        for kernel, switches in cases:
            print(target, kernel.fn.__module__, kernel.fn.__name__, compile_for(target, kernel, TILE | switches))
