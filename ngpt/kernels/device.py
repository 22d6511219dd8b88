"""Device functions that the row-wise kernels share."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, pointer):
    """fp32 to the dtype that a pointer points to, nearest even; the interpreter's cast to bf16 truncates, so there it goes by bits."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(pointer.dtype.element_ty)
