"""Device code of the pass from mixed heads to queries, keys and values, and back. fp32 in registers, one rounding at each store.

A tile holds one head of R tokens, as two [R, C] halves: entry p of the first half turns with entry p of the second, by one angle. Cosines
and sines are computed once a program, which then goes through the heads of its groups. Offsets of a tile's first token are 64 bits, those
within a tile 32.
"""

import triton
import triton.language as tl

from ngpt.kernels.device import rounded


@triton.jit
def _pairs(WIDTH: tl.constexpr, ROTATED: tl.constexpr, C: tl.constexpr):
    """Columns of a head that each half holds, [1, C], and which of them exist.

    Of the first ROTATED columns those half of ROTATED apart form pairs. The rest are paired likewise, with angles of zero.
    """
    pair = tl.arange(0, C)[None, :]
    if ROTATED == 0 or ROTATED == WIDTH:
        first = pair
        second = pair + (WIDTH + 1) // 2
    else:
        first = tl.where(pair < ROTATED // 2, pair, pair + ROTATED // 2)
        second = first + tl.where(pair < ROTATED // 2, ROTATED // 2, (WIDTH - ROTATED + 1) // 2)
    exists = pair < (WIDTH + 1) // 2
    return first, second, exists, exists & (second < WIDTH)


@triton.jit
def _cos_sin(angles_ptr, first, r, here, batch, stride, ROTATED: tl.constexpr, C: tl.constexpr):
    """Of a tile's tokens; the angles beyond ROTATED are zero."""
    if ROTATED == 0:
        return 1.0, 0.0
    else:
        pair = tl.arange(0, C)[None, :]
        position = (first + r) // batch
        mask = here[:, None] & (pair < ROTATED // 2)
        angle = tl.load(angles_ptr + position[:, None] * stride + pair, mask=mask, other=0.0)
        return tl.cos(angle), tl.sin(angle)


@triton.jit
def _turn(x, y, cos, sin, ROTATED: tl.constexpr):
    if ROTATED == 0:
        return x, y
    else:
        return x * cos - y * sin, y * cos + x * sin


@triton.jit
def _load(ptr, first, second, first_mask, second_mask):
    x = tl.load(ptr + first, mask=first_mask, other=0.0).to(tl.float32)
    y = tl.load(ptr + second, mask=second_mask, other=0.0).to(tl.float32)
    return x, y


@triton.jit
def _store(ptr, x, y, first, second, first_mask, second_mask):
    tl.store(ptr + first, rounded(x, ptr), mask=first_mask)
    tl.store(ptr + second, rounded(y, ptr), mask=second_mask)


@triton.jit
def _effective(stored, factor):
    """The effective value of a stored scale."""
    scale = stored * factor
    return scale * scale


@triton.jit(do_not_specialize=["tokens", "factor"])
def forward_kernel(
    x_ptr,
    angles_ptr,
    scale_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    inverse_ptr,
    tokens,
    factor,
    batch,
    x_stride,
    angles_stride,
    EPSILON: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    SHARES: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Queries, keys and values of R tokens, of every SHARES-th part of the groups; inverse norms [HEADS + GROUPS, tokens].

    A group has EACH queries, a key and a value.
    """
    GROUPS: tl.constexpr = HEADS // EACH
    r = tl.arange(0, R)
    first = tl.program_id(0).to(tl.int64) * R
    here = first + r < tokens
    a, b, a_mask, b_mask = _pairs(WIDTH, ROTATED, C)
    a_mask, b_mask = a_mask & here[:, None], b_mask & here[:, None]
    cos, sin = _cos_sin(angles_ptr, first, r, here, batch, angles_stride, ROTATED, C)
    x_ptr += first * x_stride + r[:, None] * x_stride
    q_ptr += first * (HEADS * WIDTH) + r[:, None] * (HEADS * WIDTH)
    k_ptr += first * (GROUPS * WIDTH) + r[:, None] * (GROUPS * WIDTH)
    v_ptr += first * (GROUPS * WIDTH) + r[:, None] * (GROUPS * WIDTH)
    if NORMALIZED:
        inverse_ptr += first + r
    group = tl.program_id(1) * (GROUPS // SHARES)
    for head in tl.range(group * EACH, (group + GROUPS // SHARES) * EACH, num_stages=STAGES):
        x, y = _load(x_ptr + (head + head // EACH * 2) * WIDTH, a, b, a_mask, b_mask)
        x, y = _turn(x, y, cos, sin, ROTATED)
        if NORMALIZED:
            inverse = tl.rsqrt(tl.sum(x * x + y * y, 1) + EPSILON)
            tl.store(inverse_ptr + tl.cast(head, tl.int64) * tokens, inverse, mask=here)
            stored_x, stored_y = _load(scale_ptr + head * WIDTH, a, b, a_mask, b_mask)
            x = x * inverse[:, None] * _effective(stored_x, factor)
            y = y * inverse[:, None] * _effective(stored_y, factor)
        _store(q_ptr + head * WIDTH, x, y, a, b, a_mask, b_mask)
    for head in tl.range(group, group + GROUPS // SHARES, num_stages=STAGES):
        key = (head * (EACH + 2) + EACH) * WIDTH
        x, y = _load(x_ptr + key, a, b, a_mask, b_mask)
        x, y = _turn(x, y, cos, sin, ROTATED)
        if NORMALIZED:
            inverse = tl.rsqrt(tl.sum(x * x + y * y, 1) + EPSILON)
            tl.store(inverse_ptr + tl.cast(HEADS + head, tl.int64) * tokens, inverse, mask=here)
            x, y = x * inverse[:, None], y * inverse[:, None]
        _store(k_ptr + head * WIDTH, x, y, a, b, a_mask, b_mask)
        x, y = _load(x_ptr + key + WIDTH, a, b, a_mask, b_mask)
        _store(v_ptr + head * WIDTH, x, y, a, b, a_mask, b_mask)


@triton.jit(do_not_specialize=["tokens", "factor"])
def backward_kernel(
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    x_ptr,
    angles_ptr,
    scale_ptr,
    inverse_ptr,
    grad_x_ptr,
    partial_ptr,
    tokens,
    factor,
    batch,
    q_token_stride,
    q_batch_stride,
    q_head_stride,
    k_token_stride,
    k_batch_stride,
    k_head_stride,
    v_token_stride,
    v_batch_stride,
    v_head_stride,
    x_stride,
    angles_stride,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    SHARES: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of the mixed heads of R tokens; a row of partials [tiles, HEADS * WIDTH] is the scale's gradient of one tile."""
    GROUPS: tl.constexpr = HEADS // EACH
    r = tl.arange(0, R)
    first = tl.program_id(0).to(tl.int64) * R
    here = first + r < tokens
    a, b, a_exists, b_exists = _pairs(WIDTH, ROTATED, C)
    a_mask, b_mask = a_exists & here[:, None], b_exists & here[:, None]
    cos, sin = _cos_sin(angles_ptr, first, r, here, batch, angles_stride, ROTATED, C)
    token = ((first + r) // batch)[:, None]
    in_batch = ((first + r) % batch)[:, None]
    grad_q_ptr += token * q_token_stride + in_batch * q_batch_stride
    grad_k_ptr += token * k_token_stride + in_batch * k_batch_stride
    grad_v_ptr += token * v_token_stride + in_batch * v_batch_stride
    row = (HEADS + 2 * GROUPS) * WIDTH
    grad_x_ptr += first * row + r[:, None] * row
    if NORMALIZED:
        x_ptr += first * x_stride + r[:, None] * x_stride
        inverse_ptr += first + r
        partial_ptr += tl.program_id(0).to(tl.int64) * (HEADS * WIDTH)
    group = tl.program_id(1) * (GROUPS // SHARES)
    for head in tl.range(group * EACH, (group + GROUPS // SHARES) * EACH, num_stages=STAGES):
        place = (head + head // EACH * 2) * WIDTH
        gx, gy = _load(grad_q_ptr + tl.cast(head, tl.int64) * q_head_stride, a, b, a_mask, b_mask)
        if NORMALIZED:
            x, y = _load(x_ptr + place, a, b, a_mask, b_mask)
            inverse = tl.load(inverse_ptr + tl.cast(head, tl.int64) * tokens, mask=here, other=0.0)[:, None]
            x, y = x * inverse, y * inverse
            turned_x, turned_y = _turn(x, y, cos, sin, ROTATED)
            stored_x, stored_y = _load(scale_ptr + head * WIDTH, a, b, a_exists, b_exists)
            grad_scale_x = tl.sum(gx * turned_x, 0)[None, :] * (2 * factor * factor * stored_x)
            grad_scale_y = tl.sum(gy * turned_y, 0)[None, :] * (2 * factor * factor * stored_y)
            _store(partial_ptr + head * WIDTH, grad_scale_x, grad_scale_y, a, b, a_exists, b_exists)
            gx, gy = gx * _effective(stored_x, factor), gy * _effective(stored_y, factor)
        gx, gy = _turn(gx, gy, cos, -sin, ROTATED)
        if NORMALIZED:
            radial = tl.sum(gx * x + gy * y, 1)[:, None]
            gx, gy = (gx - x * radial) * inverse, (gy - y * radial) * inverse
        _store(grad_x_ptr + place, gx, gy, a, b, a_mask, b_mask)
    for head in tl.range(group, group + GROUPS // SHARES, num_stages=STAGES):
        place = (head * (EACH + 2) + EACH) * WIDTH
        gx, gy = _load(grad_k_ptr + tl.cast(head, tl.int64) * k_head_stride, a, b, a_mask, b_mask)
        gx, gy = _turn(gx, gy, cos, -sin, ROTATED)
        if NORMALIZED:
            x, y = _load(x_ptr + place, a, b, a_mask, b_mask)
            inverse = tl.load(inverse_ptr + tl.cast(HEADS + head, tl.int64) * tokens, mask=here, other=0.0)[:, None]
            x, y = x * inverse, y * inverse
            radial = tl.sum(gx * x + gy * y, 1)[:, None]
            gx, gy = (gx - x * radial) * inverse, (gy - y * radial) * inverse
        _store(grad_x_ptr + place, gx, gy, a, b, a_mask, b_mask)
        gx, gy = _load(grad_v_ptr + tl.cast(head, tl.int64) * v_head_stride, a, b, a_mask, b_mask)
        _store(grad_x_ptr + place + WIDTH, gx, gy, a, b, a_mask, b_mask)
