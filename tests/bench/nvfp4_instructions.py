"""Count the machine instructions of the quantiser kernels for sm_90: the time that issuing them takes at least. Needs no GPU.

python tests/bench/nvfp4_instructions.py
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ngpt.kernels.nvfp4_quantize import kernels

POINTERS = {"x_ptr": "*bf16", "row_ptr": "*bf16", "column_ptr": "*bf16", "counts_ptr": "*i64", "amax_out_ptr": "*fp32"}
POINTERS |= {"row_codes_ptr": "*i16", "column_codes_ptr": "*i32", "row_scales_ptr": "*u8", "column_scales_ptr": "*u8"}
POINTERS |= {"row_amax_ptr": "*i32", "column_amax_ptr": "*i32"}
SCALARS = {"rows": "i32", "columns": "i32", "seed": "i64", "static_amax": "fp32", "static_encode": "fp32", "static_decode": "fp32"}
TILE = {"S": 4, "C": 128, "EVEN": True, "VEC": 4, "SQUARE": False, "AMAX": 0, "RHT": 0, "STOCHASTIC": False}
DEQUANTIZED = {"FOLD": True, "COUNT_ROW": False, "COUNT_COLUMN": False}
BOTH, ROW, COLUMN = ({"ROWWISE": row, "COLUMNWISE": column} for row, column in ((True, True), (True, False), (False, True)))
WARPS, ELEMENTS = 4, 24576 * 2048
WARP_INSTRUCTIONS_PER_SECOND = 132 * 4 * 1.755e9  # of an H100 SXM at its boost clock: four schedulers on each of 132 multiprocessors


def instructions(kernel: triton.JITFunction, switches: dict, registers: int | None) -> Counter[str]:
    """Machine instructions of a warp of one program, by name."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in switches else (POINTERS | SCALARS)[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in (*POINTERS, "rows", "columns")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in switches.items()}, aligned)
    options = {"num_warps": WARPS, "enable_fp_fusion": False} | ({"maxnreg": registers} if registers else {})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code)
        listing = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_]+)", listing)
    return Counter(name for name in found if name != "NOP")


def main() -> None:
    cases = {
        "packed, row + column": (kernels.packed_kernel, TILE | BOTH, 128),
        "packed, row": (kernels.packed_kernel, TILE | ROW, 128),
        "packed, column": (kernels.packed_kernel, TILE | COLUMN, 128),
        "BF16, row + column": (kernels.dequantized_kernel, TILE | BOTH | DEQUANTIZED, 128),
        "BF16, row + column, stochastic": (
            kernels.dequantized_kernel,
            TILE | BOTH | DEQUANTIZED | {"STOCHASTIC": True, "AMAX": 2},
            None,
        ),
    }
    for name, (kernel, switches, registers) in cases.items():
        counts = instructions(kernel, switches, registers)
        per_element = counts.total() * WARPS / (16 * TILE["S"] * TILE["C"])
        microseconds = per_element * ELEMENTS / WARP_INSTRUCTIONS_PER_SECOND * 1e6
        print(f"{name}: {per_element * 32:.1f} instructions an element, at least {microseconds:.0f} us; {counts.most_common(6)}")


if __name__ == "__main__":
    main()
