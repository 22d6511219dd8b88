"""Device code of the normalisations and of the residual step. fp32 in registers, one rounding at each store.

Tiles are [R, C]: R rows whole, C the power of two that holds a row's WIDTH. Offsets of a tile's first row are 64 bits, those within a
tile 32. A program takes every num_programs(0)-th tile, and sums alpha's gradient in registers, always over the same rows in the same
order.
"""

import triton
import triton.language as tl

from ngpt.kernels.device import GIVE, TAKE, rounded


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr,
    y_ptr,
    sums_ptr,
    inverse_ptr,
    rows,
    x_stride,
    EPSILON: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SUMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = x * inverse norm."""
    r = tl.arange(0, R)
    column = tl.arange(0, C)[None, :]
    for index in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(index * R, tl.int64)
        here = first + r < rows
        mask = (column < WIDTH) & here[:, None]
        x = tl.load(x_ptr + first * x_stride + r[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        if SUMS == TAKE:
            total = tl.load(sums_ptr + first + r, mask=here, other=0.0)
        else:
            total = tl.sum(x * x, 1)
        if SUMS == GIVE:
            tl.store(sums_ptr + first + r, total, mask=here)
        else:
            inverse = tl.rsqrt(total + EPSILON)
            tl.store(inverse_ptr + first + r, inverse, mask=here)
            tl.store(y_ptr + first * WIDTH + r[:, None] * WIDTH + column, rounded(x * inverse[:, None], y_ptr), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad_ptr,
    x_ptr,
    inverse_ptr,
    grad_x_ptr,
    sums_ptr,
    rows,
    grad_stride,
    x_stride,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SUMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_x = (grad - unit * (grad . unit)) * inverse norm."""
    r = tl.arange(0, R)
    column = tl.arange(0, C)[None, :]
    for index in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(index * R, tl.int64)
        here = first + r < rows
        mask = (column < WIDTH) & here[:, None]
        x = tl.load(x_ptr + first * x_stride + r[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + first * grad_stride + r[:, None] * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + first + r, mask=here, other=0.0)[:, None]
        unit = x * inverse
        if SUMS == TAKE:
            radial = tl.load(sums_ptr + first + r, mask=here, other=0.0)
        else:
            radial = tl.sum(grad * unit, 1)
        if SUMS == GIVE:
            tl.store(sums_ptr + first + r, radial, mask=here)
        else:
            grad_x = (grad - unit * radial[:, None]) * inverse
            tl.store(grad_x_ptr + first * WIDTH + r[:, None] * WIDTH + column, rounded(grad_x, grad_x_ptr), mask=mask)


@triton.jit
def _three(inverse_ptr, rows):
    """The inverse norms of h, of b and of the step, one after the other."""
    second = inverse_ptr + tl.cast(rows, tl.int64)
    return inverse_ptr, second, second + tl.cast(rows, tl.int64)


@triton.jit(do_not_specialize=["rows", "factor"])
def lerp_forward_kernel(
    h_ptr,
    b_ptr,
    alpha_ptr,
    out_ptr,
    inverse_ptr,
    rows,
    factor,
    h_stride,
    b_stride,
    EPSILON: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = l2_normalize(g + rate * (l2_normalize(b) - g)), g = l2_normalize(h), rate = |alpha * factor|; inverse norms [3, rows]."""
    r = tl.arange(0, R)
    column = tl.arange(0, C)[None, :]
    rate = tl.abs(tl.load(alpha_ptr + column, mask=column < WIDTH, other=0.0) * factor)
    inverse_h_ptr, inverse_b_ptr, inverse_step_ptr = _three(inverse_ptr, rows)
    for index in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(index * R, tl.int64)
        here = first + r < rows
        mask = (column < WIDTH) & here[:, None]
        h = tl.load(h_ptr + first * h_stride + r[:, None] * h_stride + column, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + first * b_stride + r[:, None] * b_stride + column, mask=mask, other=0.0).to(tl.float32)
        inverse_h = tl.rsqrt(tl.sum(h * h, 1) + EPSILON)
        inverse_b = tl.rsqrt(tl.sum(b * b, 1) + EPSILON)
        g = h * inverse_h[:, None]
        step = g + rate * (b * inverse_b[:, None] - g)
        inverse_step = tl.rsqrt(tl.sum(step * step, 1) + EPSILON)
        out = step * inverse_step[:, None]
        tl.store(inverse_h_ptr + first + r, inverse_h, mask=here)
        tl.store(inverse_b_ptr + first + r, inverse_b, mask=here)
        tl.store(inverse_step_ptr + first + r, inverse_step, mask=here)
        tl.store(out_ptr + first * WIDTH + r[:, None] * WIDTH + column, rounded(out, out_ptr), mask=mask)


@triton.jit
def _four_sums(a, b, c, d):
    """Sums along the rows, [R, 1] each, in one reduction, so that warps wait for each other only once."""
    left, right = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 1))
    a, b = tl.split(left)
    c, d = tl.split(right)
    return a[:, None], b[:, None], c[:, None], d[:, None]


@triton.jit(do_not_specialize=["rows", "factor"])
def lerp_backward_kernel(
    grad_ptr,
    h_ptr,
    b_ptr,
    alpha_ptr,
    inverse_ptr,
    grad_h_ptr,
    grad_b_ptr,
    partial_ptr,
    rows,
    factor,
    grad_stride,
    h_stride,
    b_stride,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A row of partials [programs, WIDTH] is the gradient of alpha of one program's rows.

    With step = (1 - rate) g + rate unit_b, all sums along a row are those of its two parts with the gradient and with the output.
    """
    r = tl.arange(0, R)
    column = tl.arange(0, C)[None, :]
    alpha = tl.load(alpha_ptr + column, mask=column < WIDTH, other=0.0) * factor
    rate = tl.abs(alpha)
    inverse_h_ptr, inverse_b_ptr, inverse_step_ptr = _three(inverse_ptr, rows)
    grad_rate = tl.zeros((R, C), tl.float32)
    for index in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(index * R, tl.int64)
        here = first + r < rows
        mask = (column < WIDTH) & here[:, None]
        h = tl.load(h_ptr + first * h_stride + r[:, None] * h_stride + column, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + first * b_stride + r[:, None] * b_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + first * grad_stride + r[:, None] * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        inverse_h = tl.load(inverse_h_ptr + first + r, mask=here, other=0.0)[:, None]
        inverse_b = tl.load(inverse_b_ptr + first + r, mask=here, other=0.0)[:, None]
        inverse_step = tl.load(inverse_step_ptr + first + r, mask=here, other=0.0)[:, None]
        g, unit_b = h * inverse_h, b * inverse_b
        delta, from_h, from_b = unit_b - g, (1 - rate) * g, rate * unit_b
        out = (from_h + from_b) * inverse_step
        h_grad, b_grad, h_out, b_out = _four_sums(from_h * grad, from_b * grad, from_h * out, from_b * out)
        along_out = (h_grad + b_grad) * inverse_step
        grad_step = (grad - out * along_out) * inverse_step
        grad_rate += grad_step * delta
        grad_h = (grad_step * (1 - rate) - g * ((h_grad - h_out * along_out) * inverse_step)) * inverse_h
        grad_b = (grad_step * rate - unit_b * ((b_grad - b_out * along_out) * inverse_step)) * inverse_b
        place = first * WIDTH + r[:, None] * WIDTH + column
        tl.store(grad_h_ptr + place, rounded(grad_h, grad_h_ptr), mask=mask)
        tl.store(grad_b_ptr + place, rounded(grad_b, grad_b_ptr), mask=mask)
    slope = tl.where(alpha > 0, factor, tl.where(alpha < 0, -factor, 0.0))
    grad_alpha = tl.sum(grad_rate, 0)[None, :] * slope
    tl.store(partial_ptr + tl.program_id(0) * WIDTH + column, grad_alpha, mask=column < WIDTH)
