"""Device code of the products with scales. fp32 in registers, one rounding at each store.

A program multiplies C columns of a piece of `height` rows, R rows at a time, and sums their part of the scale's gradient in registers.
Offsets of a tile's first row are 64 bits (logits have more than 2^31 elements), those within a tile 32.
"""

import triton
import triton.language as tl

from ngpt.kernels.device import rounded


@triton.jit(do_not_specialize=["rows", "height", "factor"])
def forward_kernel(
    x_ptr,
    scale_ptr,
    y_ptr,
    rows,
    height,
    factor,
    width,
    x_stride,
    R: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = x * (scale * factor)."""
    begin = tl.program_id(1) * height
    end = tl.minimum(begin + height, rows)
    r = tl.arange(0, R)
    column = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    scale = tl.load(scale_ptr + column, mask=column < width, other=0.0) * factor
    for row in tl.range(begin, end, R, num_stages=STAGES):
        first = tl.cast(row, tl.int64)
        mask = (column < width) & (first + r < end)[:, None]
        x = tl.load(x_ptr + first * x_stride + r[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + first * width + r[:, None] * width + column, rounded(x * scale, y_ptr), mask=mask)


@triton.jit(do_not_specialize=["rows", "height", "factor"])
def backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    height,
    factor,
    width,
    grad_stride,
    x_stride,
    R: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A row of partials [pieces, width] is the gradient of the scale from one piece."""
    begin = tl.program_id(1) * height
    end = tl.minimum(begin + height, rows)
    r = tl.arange(0, R)
    column = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    scale = tl.load(scale_ptr + column, mask=column < width, other=0.0) * factor
    grad_scale = tl.zeros((R, C), tl.float32)
    for row in tl.range(begin, end, R, num_stages=STAGES):
        first = tl.cast(row, tl.int64)
        mask = (column < width) & (first + r < end)[:, None]
        x = tl.load(x_ptr + first * x_stride + r[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + first * grad_stride + r[:, None] * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad_scale += grad * x
        tl.store(grad_x_ptr + first * width + r[:, None] * width + column, rounded(grad * scale, grad_x_ptr), mask=mask)
    place = tl.program_id(1).to(tl.int64) * width + column
    tl.store(partial_ptr + place, tl.sum(grad_scale, 0)[None, :] * factor, mask=column < width)


@triton.jit(do_not_specialize=["rows"])
def tokens_forward_kernel(
    x_ptr, scale_ptr, y_ptr, rows, x_stride, WIDTH: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr
):
    """y = x * scale[row]."""
    r = tl.arange(0, R)
    column = tl.arange(0, C)[None, :]
    for index in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(index * R, tl.int64)
        here = first + r < rows
        mask = (column < WIDTH) & here[:, None]
        scale = tl.load(scale_ptr + first + r, mask=here, other=0.0)[:, None]
        x = tl.load(x_ptr + first * x_stride + r[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + first * WIDTH + r[:, None] * WIDTH + column, rounded(x * scale, y_ptr), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def tokens_backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    grad_x_ptr,
    grad_scale_ptr,
    rows,
    grad_stride,
    x_stride,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_x = grad * scale[row]; grad_scale[row] = grad . x."""
    r = tl.arange(0, R)
    column = tl.arange(0, C)[None, :]
    for index in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(index * R, tl.int64)
        here = first + r < rows
        mask = (column < WIDTH) & here[:, None]
        scale = tl.load(scale_ptr + first + r, mask=here, other=0.0)[:, None]
        x = tl.load(x_ptr + first * x_stride + r[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + first * grad_stride + r[:, None] * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_scale_ptr + first + r, tl.sum(grad * x, 1), mask=here)
        tl.store(grad_x_ptr + first * WIDTH + r[:, None] * WIDTH + column, rounded(grad * scale, grad_x_ptr), mask=mask)
