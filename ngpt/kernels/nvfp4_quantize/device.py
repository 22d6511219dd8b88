"""Device functions of the quantiser: everything that decides a bit.

fp32 operations in the reference's order. Kernels must be launched with `enable_fp_fusion=False`: a fused x * scale + magic rounds once
where the reference rounds twice. The fma calls here have exact products, so they round once either way.

Shapes: tiles [S, 16, C]: S strips of 16 rows by C columns. A thread holds 16 rows of 8 neighbouring columns (bf16), so that all of a
column block and half of a row block lie in its registers.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
STATIC, DYNAMIC, DYNAMIC_POW2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
RHT_OFF, RHT_SIGNED, RHT_UNSIGNED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_EXPONENT = tl.constexpr(0x7F800000)
_SIGN = tl.constexpr(-0x80000000)
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_SIXTH = tl.constexpr(0.1666666716337204)  # fl(1 / 6)
_PHILOX_ROUNDS = tl.constexpr(7)
# Bit i says whether the signed transform negates row i.
_NEGATED_ROWS = tl.constexpr(0b1101_0111_1110_1000)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


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
    """max |x| along an axis, kept as size 1; NaN propagates, as the largest of bit patterns in the interpreter, which lacks the fold."""
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
def reciprocal(x):
    """min(fl(1 / x), FLT_MAX) of x >= 0, as IEEE division gives it. The hardware's approximation and a Newton step of exact residuals
    take a third of the instructions of a division and no branch; the GPU check compares them for every mantissa."""
    if INTERPRETED:
        return tl.minimum(tl.math.div_rn(1.0, x), _FLOAT32_MAX)
    else:
        y = tl.minimum(1.0 / x, _FLOAT32_MAX)
        y = tl.fma(tl.fma(x * -1.0, y, 1.0), y, y)
        return tl.minimum(y, _FLOAT32_MAX)


@triton.jit
def block_scales(block_amax, mult, global_decode):
    """(decode, encode) scales of blocks: the E4M3 value nearest to amax * mult, ties to even, and what maps x to E2M1's range."""
    target = tl.minimum(block_amax * mult, 448.0, propagate_nan=tl.PropagateNan.ALL)
    # 1.5 * 2^23 steps of E4M3: adding them leaves no finer bits.
    magic = float_of(bits_of(tl.maximum(target, 0.015625)) & _EXPONENT) * 1572864.0
    decode = (target + magic) - magic
    return decode, reciprocal(decode * global_decode)


@triton.jit
def e4m3_bytes(decode):
    """uint8 of E4M3 values: 2^-120 aligns the exponents of both formats, subnormal ones included."""
    return tl.where(decode != decode, 0x7F, bits_of(decode * 7.52316384526264e-37) >> 20).to(tl.uint8)


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
    """int32 E2M1 codes of the nearest values. In 1.5 * 2^23 + code the three steps of the grid are three lines; the lowest one holds."""
    magnitude = tl.abs(scaled)
    fine = bits_of(tl.fma(magnitude, 2.0, 12582912.0))
    middle = bits_of(magnitude + 12582914.0)
    coarse = bits_of(tl.fma(magnitude, 0.5, 12582916.0))
    code = tl.minimum(tl.minimum(tl.minimum(fine, middle), coarse), 0x4B400007)
    return ((bits_of(scaled) >> 28) & 8) | (code & 7)


@triton.jit
def stochastic_codes(scaled, bits):
    """int32 E2M1 codes: 2^-126 makes codes of the exponent and first mantissa bit."""
    magnitude = round_stochastically(scaled, bits) * 1.1754943508222875e-38
    return ((bits_of(scaled) >> 28) & 8) | (bits_of(magnitude) >> 22)


@triton.jit
def random_bits(seed, stream: tl.constexpr, row, draw0, DRAWS: tl.constexpr):
    """uint32 [S, 16, 8 * DRAWS] numbers below 2^16 of rows `row` int32 [S, 16, 1] from draw `draw0` on, see `ngpt.precision.philox`."""
    zero = row * 0
    draw = draw0 + tl.arange(0, DRAWS)[None, None, :]
    w0, w1, w2, w3 = tl.philox(seed, draw, row, zero + stream, zero, n_rounds=_PHILOX_ROUNDS)
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


@triton.jit
def round_to_bf16(x):
    """fp32 rounded to bf16, ties to even, in integers: the interpreter's cast truncates."""
    bits = bits_of(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x != x, x, float_of(rounded))
