"""Device functions of the quantiser: everything that decides a bit.

fp32 operations in the reference's order. Kernels must be launched with `enable_fp_fusion=False`: a fused x * scale + magic rounds once
where the reference rounds twice. The fma calls here have exact products, so they round once either way.

Shapes: tiles [S, 16, C]: S strips of 16 rows by C columns. A thread holds 16 rows of 8 neighbouring columns (bf16), so that all of a
column block and half of a row block lie in its registers.
"""

import triton
import triton.language as tl

from ngpt.kernels.device import INTERPRETED, bits_of, float_of, round_to_bf16

STATIC, DYNAMIC, DYNAMIC_POW2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
RHT_OFF, RHT_SIGNED, RHT_UNSIGNED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_EXPONENT = tl.constexpr(0x7F800000)
_SIGN = tl.constexpr(-0x80000000)
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_SMALL, _LIFT = tl.constexpr(2.0**-96), tl.constexpr(2.0**32)
_SIXTH = tl.constexpr(0.1666666716337204)  # fl(1 / 6)
CODE_BIAS = tl.constexpr(0x4B400000)  # bits of 1.5 * 2^23
# Bit i says whether the signed transform negates row i.
_NEGATED_ROWS = tl.constexpr(0b1101_0111_1110_1000)


@triton.jit
def to_float32(x):
    """Exact. bf16 goes by its bits: the interpreter's cast drops subnormal numbers."""
    if x.dtype == tl.bfloat16:
        return float_of(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_magnitude(x, axis: tl.constexpr):
    """max |x| along an axis, kept as size 1. NaN propagates; in the interpreter, which lacks this fold, as the largest bit pattern."""
    if INTERPRETED:
        return float_of(tl.max(bits_of(x) & 0x7FFFFFFF, axis, keep_dims=True))
    else:
        return tl.reduce(tl.abs(x), axis, _larger, keep_dims=True)


@triton.jit
def round_up_to_pow2_scale(amax):
    """The smallest 1.3125 * 2^j >= amax, -115 <= j <= 127; 0, Inf and NaN stay."""
    bits = bits_of(amax)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) > 0x280000).to(tl.int32)
    rounded = (tl.minimum(tl.maximum(exponent, 12), 254) << 23) | 0x280000
    return float_of(tl.where((bits == 0) | (bits >= _EXPONENT), bits, rounded))


@triton.jit
def global_scales(amax_ptr, static_amax, static_encode, static_decode, AMAX: tl.constexpr):
    """(amax, factor from block amax to block scale, global decode scale) of a tensor."""
    if AMAX == STATIC:
        return static_amax, static_encode * _SIXTH, static_decode
    else:
        amax = float_of(tl.load(amax_ptr))
        if AMAX == DYNAMIC_POW2:
            amax = round_up_to_pow2_scale(amax)
        encode = tl.math.div_rn(2688.0, amax)
        encode = tl.where(encode > _FLOAT32_MAX, _FLOAT32_MAX, encode)
        encode = tl.where((amax == 0) | (encode == 0), 1.0, encode)
        return amax, encode * _SIXTH, tl.math.div_rn(1.0, encode)


@triton.jit
def folded_factor(amax, global_decode):
    """amax / 2688 of a power of two scale: the global decode scale, which is 1 for Inf."""
    return tl.where(amax < float("inf"), global_decode, amax)


@triton.jit
def reciprocal(x, lift):
    """min(fl(1 / x), FLT_MAX) of 0 <= x < 2^126, bit for bit IEEE division: one Newton step on the hardware's approximation, no branch.

    lift: power of two >= 1 that lifts every x but 0 above 2^-126. Of 0 and NaN the step makes NaN, and the minimum FLT_MAX.
    The GPU check compares every mantissa under many exponents.
    """
    if INTERPRETED:
        return tl.minimum(tl.math.div_rn(1.0, x), _FLOAT32_MAX)
    else:
        x = x * lift
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        return tl.minimum(tl.fma(tl.fma(x * -1.0, y, 1.0), y, y) * lift, _FLOAT32_MAX)


@triton.jit
def round_to_e4m3(x):
    """(uint8 E4M3 bytes, fp32 values) nearest to x >= 0, ties to even, at most 448; NaN stays. The interpreter's cast does none of that."""
    if INTERPRETED:
        x = tl.minimum(x, 448.0, propagate_nan=tl.PropagateNan.ALL)
        # 1.5 * 2^23 steps of E4M3: adding them leaves no finer bits.
        magic = float_of(bits_of(tl.maximum(x, 0.015625)) & _EXPONENT) * 1572864.0
        value = (x + magic) - magic
        # 2^-120 aligns the exponents of both formats, subnormal ones included.
        return tl.where(x != x, 0x7F, bits_of(value * 7.52316384526264e-37) >> 20).to(tl.uint8), value
    else:
        code = x.to(tl.float8e4nv)
        return code.to(tl.uint8, bitcast=True), code.to(tl.float32)


@triton.jit
def block_scales(block_amax, mult, global_decode):
    """(E4M3 bytes, decode, encode) scales of blocks: decode is the E4M3 value, encode maps x to E2M1's range."""
    scale_bytes, decode = round_to_e4m3(block_amax * mult)
    return scale_bytes, decode, reciprocal(decode * global_decode, tl.where(global_decode < _SMALL, _LIFT, 1.0))


@triton.jit
def round_to_nearest(scaled):
    """|v| to the nearest E2M1 value, ties to even, at most 6; the sign is dropped."""
    magnitude = tl.minimum(tl.abs(scaled), 6.0)
    power = tl.maximum(float_of(bits_of(magnitude) & _EXPONENT), 1.0)
    return tl.fma(power, -6291456.0, tl.fma(power, 6291456.0, magnitude))  # 1.5 * 2^23 steps of power / 2


@triton.jit
def round_stochastically(scaled, bits):
    """|v| to one of its E2M1 neighbours as `encode_e2m1_stochastic` does, at most 6; the sign is dropped."""
    magnitude = tl.minimum(tl.abs(scaled), 6.0)
    step = tl.maximum(float_of(bits_of(magnitude) & _EXPONENT), 1.0) * 0.5
    uniform = float_of((bits << 7).to(tl.int32, bitcast=True) | 0x3F800000) - 0.99999237060546875  # (bits + 1/2) / 2^16
    moved = tl.fma(uniform, step, magnitude)
    below_one = tl.where(moved < 0.5, 0.0, 0.5)
    return tl.where(moved < 1.0, below_one, float_of(bits_of(moved) & -0x400000))


@triton.jit
def with_sign(magnitude, signed):
    return float_of(bits_of(magnitude) | (bits_of(signed) & _SIGN))


@triton.jit
def nearest_codes(scaled):
    """int32 whose low 4 bits are the E2M1 codes of the nearest values; the others hold CODE_BIAS.

    In 1.5 * 2^23 + code the three steps of the grid are three lines; the lowest one holds.
    """
    magnitude = tl.abs(scaled)
    fine = bits_of(tl.fma(magnitude, 2.0, 12582912.0))
    middle = bits_of(magnitude + 12582914.0)
    coarse = bits_of(tl.fma(magnitude, 0.5, 12582916.0))
    code = tl.minimum(tl.minimum(tl.minimum(fine, middle), coarse), CODE_BIAS + 7)
    return ((bits_of(scaled) >> 28) & 8) | code


@triton.jit
def stochastic_codes(scaled, bits):
    """int32 as `nearest_codes`: 2^-126 makes codes of the exponent and first mantissa bit."""
    code = bits_of(round_stochastically(scaled, bits) * 1.1754943508222875e-38) >> 22
    return ((bits_of(scaled) >> 28) & 8) | code | CODE_BIAS


@triton.jit
def pack_codes(codes, LOG: tl.constexpr):
    """int32 [..., n] of codes [..., n * 2^LOG], the first one lowest, 4 bits each; above 16 bits as if CODE_BIAS were 0."""
    for level in tl.static_range(LOG):
        even, odd = tl.split(tl.reshape(codes, codes.shape[:-1] + (codes.shape[-1] // 2, 2)))
        codes = even + (odd << (4 << level))
    if LOG == 3:
        codes -= 0x3F400000  # 0x11111111 * CODE_BIAS
    return codes


@triton.jit
def philox4x32(c0, c1, c2, c3, seed):
    """Four uint32 words of a counter of four, as `ngpt.precision.philox`. One wide product instead of a high and a low one."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        product_0, product_2 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (product_2 >> 32).to(tl.uint32) ^ c1 ^ k0, (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product_2.to(tl.uint32), product_0.to(tl.uint32)
        k0, k1 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False), tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def random_bits(seed, stream: tl.constexpr, row, draw0, DRAWS: tl.constexpr):
    """uint32 [S, 16, 8 * DRAWS] numbers below 2^16 of rows `row` int32 [S, 16, 1] from draw `draw0` on, see `ngpt.precision.philox`."""
    zero = (row * 0).to(tl.uint32)
    draw = (draw0 + tl.arange(0, DRAWS)[None, None, :]).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(draw, row.to(tl.uint32), zero + stream, zero, seed.to(tl.uint64))
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (row.shape[0], row.shape[1], 8 * DRAWS))


@triton.jit
def hadamard_transform(x, RHT: tl.constexpr):
    """fp32 [S, 16, C]: the 16 rows transformed in fp64 as `random_hadamard_transform` does, rounded to bf16."""
    S: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[2]
    if RHT == RHT_SIGNED:
        row = tl.arange(0, 16)[None, :, None]
        x = float_of(bits_of(x) ^ (((_NEGATED_ROWS >> row) & 1) << 31))  # -x is 0 - x here, which loses the sign of zero
    sums = x.to(tl.float64)
    for log in tl.static_range(4):
        pairs = tl.permute(tl.reshape(sums, (S, 8 >> log, 2, 1 << log, C)), (0, 1, 3, 4, 2))
        first, second = tl.split(pairs)
        pairs = tl.join(first + second, first - second)
        sums = tl.reshape(tl.permute(pairs, (0, 1, 4, 2, 3)), (S, 16, C))
    return round_to_bf16((sums * 0.25).to(tl.float32))
