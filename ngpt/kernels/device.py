"""Device functions that kernels share."""

import triton
import triton.language as tl

# What a kernel does about sums over ranks: compute and apply them; only compute and store them; only apply stored ones.
OWN, GIVE, TAKE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_to_bf16(x):
    """fp32 rounded to bf16, ties to even, in integers: the interpreter's cast truncates."""
    bits = bits_of(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x != x, x, float_of(rounded))


@triton.jit
def rounded(x, pointer):
    """fp32 to the dtype that a pointer points to, nearest even; the interpreter's cast to bf16 truncates, so there it goes by bits."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        return (bits_of(round_to_bf16(x)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(pointer.dtype.element_ty)
