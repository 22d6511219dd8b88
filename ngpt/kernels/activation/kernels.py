"""Device code of the scaled activations. fp32 in registers, one rounding at each store.

A piece is a run of rows that share a scale vector; a program works on one piece, R rows at a time. Rows that get a norm are whole. With
NORM the activation gets unit norm over its features, and SUMS says what happens to the sum of squares where ranks hold parts of a row.
Without NORM a program may take C columns of wider rows. A gated row of u and of the scale is (gate, up), WIDTH features each. `table_ptr`
(int32) holds the pieces' groups, first rows and ends, one after the other, then each group's first piece and the number of pieces; where
not GROUPED, a piece is `height` rows. FUNCTION is one of FUNCTIONS. Offsets of a tile's first row are 64 bits, those within a tile 32.
"""

import triton
import triton.language as tl

from ngpt.kernels.activation import functions
from ngpt.kernels.device import GIVE, TAKE, rounded

vars(functions)["tl"] = tl  # Triton's interpreter looks for its language where a function was written
FUNCTIONS = {name: triton.jit(function) for name, function in functions.FUNCTIONS.items()}


@triton.jit
def _rows_of_piece(table_ptr, rows, height, GROUPED: tl.constexpr):
    """Group, first row and end of this program's piece."""
    piece, pieces = tl.program_id(0), tl.num_programs(0)
    if GROUPED:
        return tl.load(table_ptr + piece), tl.load(table_ptr + pieces + piece), tl.load(table_ptr + 2 * pieces + piece)
    else:
        return 0, piece * height, tl.minimum(piece * height + height, rows)


@triton.jit(do_not_specialize=["rows", "height", "factor"])
def forward_kernel(
    u_ptr,
    scale_ptr,
    y_ptr,
    inverse_ptr,
    sums_ptr,
    table_ptr,
    rows,
    height,
    factor,
    u_stride,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    SUMS: tl.constexpr,
    GROUPED: tl.constexpr,
    EPSILON: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = f(scale * factor * u), or f of the gate half times the up half; of unit norm where NORM."""
    group, begin, end = _rows_of_piece(table_ptr, rows, height, GROUPED)
    r = tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    scale_row_ptr = scale_ptr + group * (2 * WIDTH if GATED else WIDTH) + column
    scale = tl.load(scale_row_ptr, mask=column < WIDTH, other=0.0) * factor
    if GATED:
        up_scale = tl.load(scale_row_ptr + WIDTH, mask=column < WIDTH, other=0.0) * factor
    for row in tl.range(begin, end, R, num_stages=STAGES):
        first = tl.cast(row, tl.int64)
        here = first + r < end
        mask = (column < WIDTH) & here[:, None]
        at_ptr = u_ptr + first * u_stride + r[:, None] * u_stride + column
        y, _ = FUNCTION(tl.load(at_ptr, mask=mask, other=0.0).to(tl.float32) * scale)
        if GATED:
            y *= tl.load(at_ptr + WIDTH, mask=mask, other=0.0).to(tl.float32) * up_scale
        if NORM:
            if SUMS == TAKE:
                total = tl.load(sums_ptr + first + r, mask=here, other=0.0)
            else:
                total = tl.sum(y * y, 1)
            if SUMS == GIVE:
                tl.store(sums_ptr + first + r, total, mask=here)
            else:
                inverse = tl.rsqrt(total + EPSILON)
                tl.store(inverse_ptr + first + r, inverse, mask=here)
                y *= inverse[:, None]
        if SUMS != GIVE:
            tl.store(y_ptr + first * WIDTH + r[:, None] * WIDTH + column, rounded(y, y_ptr), mask=mask)


@triton.jit(do_not_specialize=["rows", "height", "factor"])
def backward_kernel(
    grad_ptr,
    u_ptr,
    scale_ptr,
    inverse_ptr,
    grad_u_ptr,
    sums_ptr,
    partial_ptr,
    table_ptr,
    rows,
    height,
    factor,
    grad_stride,
    u_stride,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    SUMS: tl.constexpr,
    GROUPED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The activation is computed again from u. A row of partials [pieces, features of u] is the gradient of the scale from one piece."""
    group, begin, end = _rows_of_piece(table_ptr, rows, height, GROUPED)
    r = tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    inside = column < WIDTH
    WHOLE: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    scale_row_ptr = scale_ptr + group * WHOLE + column
    scale = tl.load(scale_row_ptr, mask=inside, other=0.0) * factor
    grad_scale = tl.zeros((R, C), tl.float32)
    if GATED:
        up_scale = tl.load(scale_row_ptr + WIDTH, mask=inside, other=0.0) * factor
        grad_up_scale = tl.zeros((R, C), tl.float32)
    for row in tl.range(begin, end, R, num_stages=STAGES):
        first = tl.cast(row, tl.int64)
        here = first + r < end
        mask = inside & here[:, None]
        at_ptr = u_ptr + first * u_stride + r[:, None] * u_stride + column
        u = tl.load(at_ptr, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + first * grad_stride + r[:, None] * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        value, slope = FUNCTION(u * scale)
        y = value
        if GATED:
            up = tl.load(at_ptr + WIDTH, mask=mask, other=0.0).to(tl.float32)
            y *= up * up_scale
        if NORM:
            inverse = tl.load(inverse_ptr + first + r, mask=here, other=0.0)[:, None]
            y *= inverse
            if SUMS == TAKE:
                radial = tl.load(sums_ptr + first + r, mask=here, other=0.0)
            else:
                radial = tl.sum(grad * y, 1)
            if SUMS == GIVE:
                tl.store(sums_ptr + first + r, radial, mask=here)
            else:
                grad = (grad - y * radial[:, None]) * inverse
        if SUMS != GIVE:
            grad_u_row_ptr = grad_u_ptr + first * WHOLE + r[:, None] * WHOLE + column
            if GATED:
                grad_up = grad * value
                grad_up_scale += grad_up * up
                tl.store(grad_u_row_ptr + WIDTH, rounded(grad_up * up_scale, grad_u_ptr), mask=mask)
                grad *= up * up_scale
            grad *= slope
            grad_scale += grad * u
            tl.store(grad_u_row_ptr, rounded(grad * scale, grad_u_ptr), mask=mask)
    if SUMS != GIVE:
        partial_row_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * WHOLE + column
        tl.store(partial_row_ptr, tl.sum(grad_scale, 0)[None, :] * factor, mask=inside)
        if GATED:
            tl.store(partial_row_ptr + WIDTH, tl.sum(grad_up_scale, 0)[None, :] * factor, mask=inside)


@triton.jit(do_not_specialize=["pieces"])
def sum_pieces_kernel(partial_ptr, table_ptr, out_ptr, pieces, width, R: tl.constexpr, C: tl.constexpr):
    """out[g] = sum of the partials of group g's pieces, R at a time; zero for a group without pieces."""
    group = tl.program_id(1)
    starts_ptr = table_ptr + 3 * pieces
    r = tl.arange(0, R)
    column = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    end = tl.load(starts_ptr + group + 1)
    total = tl.zeros((R, C), tl.float32)
    for piece in tl.range(tl.load(starts_ptr + group), end, R):
        mask = (column < width) & (piece + r < end)[:, None]
        total += tl.load(partial_ptr + tl.cast(piece, tl.int64) * width + r[:, None] * width + column, mask=mask, other=0.0)
    tl.store(out_ptr + tl.cast(group, tl.int64) * width + column, tl.sum(total, 0)[None, :], mask=column < width)
