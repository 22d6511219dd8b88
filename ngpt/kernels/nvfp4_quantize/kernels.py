"""The kernels: each reads the matrix once and writes both directions. What decides a bit is in `device`.

Programs run over tiles from the last to the first, so that after the amax kernel, which runs forward, they find its last reads in L2.
Shapes: x [M, K], tiles [S, 16, C]; row blocks [S, 16, C / 16, 1], column blocks [S, 1, C / 16, 16], square blocks [S, 1, C / 16, 1].
"""

import triton
import triton.language as tl

from ngpt.kernels.nvfp4_quantize.device import (
    DYNAMIC,
    RHT_OFF,
    bits_of,
    block_scales,
    folded_factor,
    global_scales,
    hadamard_transform,
    max_magnitude,
    nearest_codes,
    pack_codes,
    random_bits,
    round_stochastically,
    round_to_nearest,
    stochastic_codes,
    to_float32,
    with_sign,
)


@triton.jit
def _tile_origin(columns, program, S: tl.constexpr, C: tl.constexpr):
    across = tl.cdiv(columns, C)
    return (program // across) * (16 * S), (program % across) * C


@triton.jit
def _columns(C: tl.constexpr, VEC: tl.constexpr):
    """int32 [1, 1, C]. A thread gets VEC neighbouring columns, which the compiler is told are contiguous."""
    column = tl.arange(0, C)[None, None, :]
    return tl.max_contiguous(tl.multiple_of(column, (1, 1, VEC)), (1, 1, VEC))


@triton.jit
def _inside(line0, place0, line, place, lines, places):
    return (line0 + line < lines) & (place0 + place < places)


@triton.jit
def _load_tile(matrix_ptr, line0, place0, line, place, lines, places, EVEN: tl.constexpr):
    """fp32 values at [line0 + line, place0 + place] of a matrix [lines, places], zero outside; EVEN: nothing lies outside."""
    pointers = matrix_ptr + (line0.to(tl.int64) * places + place0) + (line * places + place)
    if EVEN:
        return to_float32(tl.load(pointers))
    else:
        return to_float32(tl.load(pointers, mask=_inside(line0, place0, line, place, lines, places), other=0.0))


@triton.jit
def _store_tile(matrix_ptr, line0, place0, line, place, lines, places, values, EVEN: tl.constexpr):
    """The reverse of `_load_tile`."""
    pointers = matrix_ptr + (line0.to(tl.int64) * places + place0) + (line * places + place)
    if EVEN:
        tl.store(pointers, values.to(matrix_ptr.dtype.element_ty))
    else:
        tl.store(pointers, values.to(matrix_ptr.dtype.element_ty), mask=_inside(line0, place0, line, place, lines, places))


@triton.jit
def amax_kernel(x_ptr, out_ptr, rows, columns, RHT: tl.constexpr, S: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, VEC: tl.constexpr):
    """max |x|, or of the transformed x, as an fp32 bit pattern: int32 order is magnitude order with NaN on top. `out` starts at 0."""
    row0, column0 = _tile_origin(columns, tl.program_id(0), S, C)
    row = tl.arange(0, S)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None]
    column = _columns(C, VEC)
    x = _load_tile(x_ptr, row0, column0, row, column, rows, columns, EVEN)
    if RHT != RHT_OFF:
        x = hadamard_transform(x, RHT)
    bits = bits_of(max_magnitude(x, 1))
    tl.atomic_max(out_ptr, tl.max(tl.reshape(bits, (S * C,)), 0), sem="relaxed")


@triton.jit
def _row_block_amax(x, SQUARE: tl.constexpr):
    """fp32 [S, 16, C / 16, 1], or [S, 1, C / 16, 1] of square blocks."""
    amax = max_magnitude(tl.reshape(x, (x.shape[0], 16, x.shape[2] // 16, 16)), 3)
    if SQUARE:
        amax = max_magnitude(amax, 1)
    return amax


@triton.jit
def _column_block_amax(x, SQUARE: tl.constexpr):
    """fp32 [S, 1, C / 16, 16], or [S, 1, C / 16, 1] of square blocks."""
    amax = tl.reshape(max_magnitude(x, 1), (x.shape[0], 1, x.shape[2] // 16, 16))
    if SQUARE:
        amax = max_magnitude(amax, 3)
    return amax


@triton.jit
def _times(x, block_factor):
    """x [S, 16, C] times the factor of its block, [S, 16 or 1, C / 16, 16 or 1]."""
    by_block = tl.reshape(x, (x.shape[0], 16, x.shape[2] // 16, 16))
    return tl.reshape(by_block * block_factor, x.shape)


@triton.jit
def _count(counts_ptr, x, block_amax, decode, amax, AMAX: tl.constexpr):
    """Add saturated elements and flushed blocks. Single elements are only looked at in the rare tile that has a saturated block."""
    tally = ((decode == 0) & (block_amax != 0)).to(tl.int32)
    if AMAX != DYNAMIC:
        tally += (block_amax > amax).to(tl.int32) << 16
    tally = tl.sum(tl.ravel(tally), 0)
    if tally > 0:
        tl.atomic_add(counts_ptr + 1, (tally & 0xFFFF).to(tl.int64), sem="relaxed")
        if AMAX != DYNAMIC:
            if tally >= 0x10000:
                tl.atomic_add(counts_ptr, tl.sum(tl.ravel((tl.abs(x) > amax).to(tl.int32)), 0).to(tl.int64), sem="relaxed")


@triton.jit
def _dequantized(
    x, decode, encode, amax, global_decode, seed, row, draw0, FOLD: tl.constexpr, STREAM: tl.constexpr, STOCHASTIC: tl.constexpr
):
    """fp32 [S, 16, C]."""
    scaled = _times(x, encode)
    if STOCHASTIC:
        magnitude = round_stochastically(scaled, random_bits(seed, STREAM, row, draw0, x.shape[2] // 8))
    else:
        magnitude = round_to_nearest(scaled)
    if FOLD:
        decode = decode * folded_factor(amax, global_decode)
    return _times(with_sign(magnitude, scaled), decode)


@triton.jit(do_not_specialize=["seed", "static_amax", "static_encode", "static_decode"])
def dequantized_kernel(
    x_ptr,
    row_ptr,
    column_ptr,
    row_amax_ptr,
    column_amax_ptr,
    counts_ptr,
    static_amax,
    static_encode,
    static_decode,
    seed: tl.int64,
    rows,
    columns,
    ROWWISE: tl.constexpr,
    COLUMNWISE: tl.constexpr,
    SQUARE: tl.constexpr,
    AMAX: tl.constexpr,
    FOLD: tl.constexpr,
    RHT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COUNT_ROW: tl.constexpr,
    COUNT_COLUMN: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    EVEN: tl.constexpr,
    VEC: tl.constexpr,
):
    """Quantised and dequantised x [M, K]: row_ptr with blocks along K or square ones, column_ptr with blocks along M of the transformed x.

    amax: int32 bit patterns, not read under a static scale. counts: int64 [2, 2], (row, column) by (saturated elements, flushed blocks).
    """
    row0, column0 = _tile_origin(columns, tl.num_programs(0) - 1 - tl.program_id(0), S, C)
    row = tl.arange(0, S)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None]
    column = _columns(C, VEC)
    x = _load_tile(x_ptr, row0, column0, row, column, rows, columns, EVEN)
    if ROWWISE:
        amax, mult, global_decode = global_scales(row_amax_ptr, static_amax, static_encode, static_decode, AMAX)
        block_amax = _row_block_amax(x, SQUARE)
        scale_bytes, decode, encode = block_scales(block_amax, mult, global_decode)
        values = _dequantized(x, decode, encode, amax, global_decode, seed, row0 + row, column0 // 8, FOLD, 0, STOCHASTIC)
        _store_tile(row_ptr, row0, column0, row, column, rows, columns, values, EVEN)
        if COUNT_ROW:
            _count(counts_ptr, x, block_amax, decode, amax, AMAX)
        if COUNT_COLUMN and not COLUMNWISE:
            _count(counts_ptr + 2, x, block_amax, decode, amax, AMAX)
    if COLUMNWISE:
        if RHT != RHT_OFF:
            x = hadamard_transform(x, RHT)
        amax, mult, global_decode = global_scales(column_amax_ptr, static_amax, static_encode, static_decode, AMAX)
        block_amax = _column_block_amax(x, SQUARE)
        scale_bytes, decode, encode = block_scales(block_amax, mult, global_decode)
        values = _dequantized(x, decode, encode, amax, global_decode, seed, row0 + row, column0 // 8, FOLD, 0 if SQUARE else 1, STOCHASTIC)
        _store_tile(column_ptr, row0, column0, row, column, rows, columns, values, EVEN)
        if COUNT_COLUMN:
            _count(counts_ptr + 2, x, block_amax, decode, amax, AMAX)


@triton.jit
def _codes(x, encode, seed, row, draw0, STREAM: tl.constexpr, STOCHASTIC: tl.constexpr):
    """int32 E2M1 codes [S, 16, C]."""
    scaled = _times(x, encode)
    if STOCHASTIC:
        return stochastic_codes(scaled, random_bits(seed, STREAM, row, draw0, x.shape[2] // 8))
    else:
        return nearest_codes(scaled)


@triton.jit(do_not_specialize=["seed", "static_amax", "static_encode", "static_decode"])
def packed_kernel(
    x_ptr,
    row_codes_ptr,
    row_scales_ptr,
    column_codes_ptr,
    column_scales_ptr,
    row_amax_ptr,
    column_amax_ptr,
    counts_ptr,
    amax_out_ptr,
    static_amax,
    static_encode,
    static_decode,
    seed: tl.int64,
    rows,
    columns,
    ROWWISE: tl.constexpr,
    COLUMNWISE: tl.constexpr,
    SQUARE: tl.constexpr,
    AMAX: tl.constexpr,
    RHT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    EVEN: tl.constexpr,
    VEC: tl.constexpr,
):
    """Codes and scale bytes of both directions: row int16 [M, K / 4], uint8 [M, K / 16]; column int32 [K, M / 8], uint8 [K, M / 16].

    amax: int32 bit patterns, not read under a static scale. counts int64 [2, 2] and amax_out fp32 [2] of the row and column directions.
    """
    row0, column0 = _tile_origin(columns, tl.num_programs(0) - 1 - tl.program_id(0), S, C)
    row = tl.arange(0, S)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None]
    column = _columns(C, VEC)
    x = _load_tile(x_ptr, row0, column0, row, column, rows, columns, EVEN)
    nan_word: tl.constexpr = 0x77777777 if STOCHASTIC else 0
    if ROWWISE:
        amax, mult, global_decode = global_scales(row_amax_ptr, static_amax, static_encode, static_decode, AMAX)
        block_amax = _row_block_amax(x, SQUARE)
        scale_bytes, decode, encode = block_scales(block_amax, mult, global_decode)
        codes = _codes(x, encode, seed, row0 + row, column0 // 8, 0, STOCHASTIC)
        words = tl.reshape(pack_codes(codes, 2), (S, 16, C // 16, 4))
        words = tl.reshape(tl.where(decode != decode, nan_word, words), (S, 16, C // 4))
        scale_bytes = tl.reshape(tl.broadcast_to(scale_bytes, (S, 16, C // 16, 1)), (S, 16, C // 16))
        word = tl.arange(0, C // 4)[None, None, :]
        block = tl.arange(0, C // 16)[None, None, :]
        _store_tile(row_codes_ptr, row0, column0 // 4, row, word, rows, columns // 4, words, EVEN)
        _store_tile(row_scales_ptr, row0, column0 // 16, row, block, rows, columns // 16, scale_bytes, EVEN)
        _count(counts_ptr, x, block_amax, decode, amax, AMAX)
        tl.store(amax_out_ptr, amax)
    if COLUMNWISE:
        if RHT != RHT_OFF:
            x = hadamard_transform(x, RHT)
        amax, mult, global_decode = global_scales(column_amax_ptr, static_amax, static_encode, static_decode, AMAX)
        block_amax = _column_block_amax(x, SQUARE)
        scale_bytes, decode, encode = block_scales(block_amax, mult, global_decode)
        codes = _codes(x, encode, seed, row0 + row, column0 // 8, 0 if SQUARE else 1, STOCHASTIC)
        words = tl.reshape(pack_codes(tl.permute(tl.reshape(codes, (S, 2, 8, C)), (0, 1, 3, 2)), 3), (S, 2, C // 16, 16))
        words = tl.where(decode != decode, nan_word, words)
        scale_bytes = tl.broadcast_to(scale_bytes, (S, 1, C // 16, 16))
        line = tl.arange(0, C)[:, None]
        word = tl.arange(0, 2 * S)[None, :]
        block = tl.arange(0, S)[None, :]
        words = tl.trans(tl.reshape(words, (2 * S, C)))
        scale_bytes = tl.trans(tl.reshape(scale_bytes, (S, C)))
        _store_tile(column_codes_ptr, column0, row0 // 8, line, word, columns, rows // 8, words, EVEN)
        _store_tile(column_scales_ptr, column0, row0 // 16, line, block, columns, rows // 16, scale_bytes, EVEN)
        _count(counts_ptr + 2, x, block_amax, decode, amax, AMAX)
        tl.store(amax_out_ptr + 1, amax)
