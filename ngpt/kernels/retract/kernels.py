"""Device code of the retraction. fp32 in registers; no atomics, every sum has a fixed order.

The matrices are separate tensors: a row of a table (int64), which begins with an address, says where a program works. ALIGNED promises
that addresses are multiples of 16 bytes and that all counts of columns and positions are multiples of 4, for loads of 16 bytes a thread.
"""

import triton
import triton.language as tl

from ngpt.kernels.device import GIVE, OWN, TAKE

ROW_FIELDS, LINE_FIELDS, STRIP_FIELDS = tl.constexpr(3), tl.constexpr(3), tl.constexpr(7)


@triton.jit
def _address(entry, ALIGNED: tl.constexpr):
    """The pointer that an entry of a table begins with."""
    pointer = tl.load(entry).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _count(place, ALIGNED: tl.constexpr):
    """A number of a table that ALIGNED promises to be a multiple of 4."""
    number = tl.load(place)
    return tl.multiple_of(number, 4) if ALIGNED else number


@triton.jit
def rows_kernel(table_ptr, EPSILON: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr):
    """Divide whole rows by their norms, R at a time, each held in registers: one read and one write. Table: address, rows, columns."""
    entry = table_ptr + tl.program_id(0).to(tl.int64) * ROW_FIELDS
    x_ptr = _address(entry, ALIGNED)
    rows = tl.load(entry + 1).to(tl.int32)
    cols = _count(entry + 2, ALIGNED).to(tl.int32)
    r = tl.arange(0, R)
    column = tl.arange(0, C)[None, :]
    for first in tl.range(0, rows, R, num_stages=STAGES):
        mask = (column < cols) & (first + r < rows)[:, None]
        tile = x_ptr + first * cols + r[:, None] * cols + column
        x = tl.load(tile, mask=mask, other=0.0)
        factor = tl.rsqrt(tl.sum(x * x, 1) + EPSILON)
        tl.store(tile, x * factor[:, None], mask=mask)


@triton.jit
def lines_kernel(table_ptr, sums_ptr, EPSILON: tl.constexpr, C: tl.constexpr, SUMS: tl.constexpr):
    """A program has one piece of a row: it gives the sum of its squares, or takes the row's. Table: address, length, place of the sum."""
    entry = table_ptr + tl.program_id(0).to(tl.int64) * LINE_FIELDS
    x_ptr = _address(entry, False)
    length = tl.load(entry + 1).to(tl.int32)
    sum_ptr = sums_ptr + tl.load(entry + 2)
    column = tl.arange(0, C)
    if SUMS == GIVE:
        total = tl.zeros((C,), tl.float32)
        for first in tl.range(0, length, C):
            x = tl.load(x_ptr + first + column, mask=first + column < length, other=0.0)
            total += x * x
        tl.store(sum_ptr, tl.sum(total, 0))
    else:
        factor = tl.rsqrt(tl.load(sum_ptr) + EPSILON)
        for first in tl.range(0, length, C):
            x = tl.load(x_ptr + first + column, mask=first + column < length, other=0.0)
            tl.store(x_ptr + first + column, x * factor, mask=first + column < length)


@triton.jit
def _tile_of_strip(x_ptr, first, rows, cols, column, low, high, R: tl.constexpr, CUT: tl.constexpr):
    """Pointers and mask of R rows of a strip. CUT: only the matrix's positions from low to high are there."""
    row = first + tl.arange(0, R)[:, None]
    offset = row.to(tl.int64) * cols
    if CUT:
        mask = (column < cols) & (column >= low - offset) & (column < high - offset)
    else:
        mask = (column < cols) & (row < rows)
    return x_ptr + offset + column, mask


@triton.jit(do_not_specialize=["strips"])
def columns_kernel(
    table_ptr,
    sums_ptr,
    strips,
    EPSILON: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SUMS: tl.constexpr,
    HELD: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Divide columns by their norms; a program takes strips of C columns and walks down their rows, R at a time.

    HELD: all R rows stay in registers, for one read and one write. Otherwise OWN walks twice, the second time through what the L2
    cache has kept. GIVE and TAKE are for shards, whose first and last row may be cut.

    Table: address of the first row's column 0, rows, columns, first column of the strip, first and last position that is there, counted
    from that address, place of the strip's sums. Where a shard starts inside a row, this address lies before the shard and is not read.
    """
    for strip in tl.range(tl.program_id(0), strips, tl.num_programs(0)):
        entry = table_ptr + tl.cast(strip, tl.int64) * STRIP_FIELDS
        x_ptr = _address(entry, ALIGNED)
        rows = tl.load(entry + 1).to(tl.int32)
        cols = _count(entry + 2, ALIGNED).to(tl.int32)
        column = _count(entry + 3, ALIGNED).to(tl.int32) + tl.arange(0, C)[None, :]
        low, high = _count(entry + 4, ALIGNED), _count(entry + 5, ALIGNED)
        sums = sums_ptr + tl.load(entry + 6) + tl.arange(0, C)[None, :]
        if HELD:
            tile, mask = _tile_of_strip(x_ptr, 0, rows, cols, column, low, high, R, False)
            x = tl.load(tile, mask=mask, other=0.0)
            factor = tl.rsqrt(tl.sum(x * x, 0)[None, :] + EPSILON)
            tl.store(tile, x * factor, mask=mask)
        else:
            if SUMS == TAKE:
                total = tl.load(sums, mask=column < cols, other=0.0)
            else:
                squares = tl.zeros((R, C), tl.float32)
                for first in tl.range(0, rows, R, num_stages=STAGES):
                    tile, mask = _tile_of_strip(x_ptr, first, rows, cols, column, low, high, R, SUMS != OWN)
                    x = tl.load(tile, mask=mask, other=0.0)
                    squares += x * x
                total = tl.sum(squares, 0)[None, :]
            if SUMS == GIVE:
                tl.store(sums, total, mask=column < cols)
            else:
                factor = tl.rsqrt(total + EPSILON)
                for first in tl.range(0, rows, R, num_stages=STAGES):
                    tile, mask = _tile_of_strip(x_ptr, first, rows, cols, column, low, high, R, SUMS != OWN)
                    x = tl.load(tile, mask=mask, other=0.0)
                    tl.store(tile, x * factor, mask=mask)
