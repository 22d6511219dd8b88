"""Compile the retraction's kernels for GPUs that need not be there: `python compile_retract.py CAPABILITY...`."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ngpt.kernels.retract import kernels
from ngpt.kernels.retract import triton as shipped

HEIGHT = WIDTH = 2048
KINDS = {"table_ptr": "*i64", "sums_ptr": "*fp32", "strips": "i32"}


def cases():
    """(kernel, constants, warps) of every kernel that is shipped for the widths of the models."""
    for aligned in (True, False):
        rows, columns, warps = shipped.ROWS.tile(WIDTH)
        yield kernels.rows_kernel, dict(R=rows, C=columns, ALIGNED=aligned, STAGES=shipped.ROWS.stages), warps
        for height in (HEIGHT, 4096):
            tiling, (rows, columns), is_held = shipped._columns_of(height, aligned)
            shape = dict(R=rows, C=columns, HELD=is_held, ALIGNED=aligned, STAGES=tiling.stages)
            yield kernels.columns_kernel, shape | {"SUMS": kernels.OWN.value}, tiling.warps
        for part in (kernels.GIVE, kernels.TAKE):
            rows, columns = shipped._fill(shipped.CUT, shipped.CUT_COLUMNS)
            shape = dict(R=rows, C=columns, HELD=False, ALIGNED=aligned, STAGES=shipped.CUT.stages, SUMS=part.value)
            yield kernels.columns_kernel, shape, shipped.CUT.warps
    for part in (kernels.GIVE, kernels.TAKE):
        yield kernels.lines_kernel, dict(C=shipped.LINE, SUMS=part.value), 4


def compiled(capability: int, kernel: triton.JITFunction, constants: dict, warps: int):
    names = kernel.arg_names
    constants = constants | {"EPSILON": 1e-12}
    signature = {name: KINDS.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for kernel, constants, warps in cases():
            code = compiled(capability, kernel, constants, warps)
            print(capability, kernel.fn.__module__, kernel.fn.__name__, len(code.asm["cubin"]))
