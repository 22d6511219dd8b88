"""Device code of the experts' weight gradients. Sums in fp32, each in one program and one order.

A program owns a tile [BN, BK] of one expert's total and walks over the expert's rows, R at a time; neighbouring programs have the same
expert, whose rows the L2 cache then serves. Offsets of rows and experts are 64 bits, those within a tile 32.
"""

import triton
import triton.language as tl

from ngpt.kernels.device import INTERPRETED


@triton.jit
def _add_rows(sums, dy_ptr, x_ptr, first, end, N, K, n, k, R: tl.constexpr, MASKED: tl.constexpr):
    """sums + dy^T x over rows first .. first + R. MASKED: rows from `end` on do not count."""
    r = tl.arange(0, R)[:, None]
    dy_mask, x_mask = n < N, k < K
    if MASKED:
        here = first + r < end
        dy_mask, x_mask = dy_mask & here, x_mask & here
    start = tl.cast(first, tl.int64)
    dy = tl.load(dy_ptr + start * N + r * N + n, mask=dy_mask, other=0.0)
    x = tl.load(x_ptr + start * K + r * K + k, mask=x_mask, other=0.0)
    if INTERPRETED:  # where bf16 would be multiplied as integers
        dy, x = dy.to(tl.float32), x.to(tl.float32)
    return tl.dot(tl.trans(dy), x, sums)


@triton.jit(do_not_specialize=["n_units", "k_units"])
def add_kernel(
    total_ptr,
    dy_ptr,
    x_ptr,
    ends_ptr,
    n_units,
    k_units,
    UNIT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    PEELED: tl.constexpr,
    ATOMIC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """total[e] += dy_e^T x_e; an expert without rows is not touched.

    UNIT: N and K are so many times `n_units` and `k_units`; 8 tells the compiler that a thread may load 16 bytes at once.
    PEELED: a last block of rows that is not whole has a step of its own behind the loop, whose loads then need no mask of rows.
    ATOMIC: the L2 cache adds, once to every number, so that no program waits for the total.
    """
    N, K = n_units * UNIT, k_units * UNIT
    expert = tl.program_id(1)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    if begin < end:
        tile = tl.program_id(0)
        n = tile // tl.cdiv(K, BK) * BN + tl.arange(0, BN)
        k = tile % tl.cdiv(K, BK) * BK + tl.arange(0, BK)
        loop_end = end - (end - begin) % R if PEELED else end
        sums = tl.zeros((BN, BK), tl.float32)
        for first in tl.range(begin, loop_end, R, num_stages=STAGES):
            sums = _add_rows(sums, dy_ptr, x_ptr, first, end, N, K, n[None, :], k[None, :], R, not PEELED)
        if PEELED and loop_end < end:
            sums = _add_rows(sums, dy_ptr, x_ptr, loop_end, end, N, K, n[None, :], k[None, :], R, True)
        mask = (n < N)[:, None] & (k < K)[None, :]
        at_ptr = total_ptr + tl.cast(expert, tl.int64) * N * K + n[:, None] * K + k[None, :]
        if ATOMIC:
            tl.atomic_add(at_ptr, sums, mask=mask, sem="relaxed")
        else:
            tl.store(at_ptr, tl.load(at_ptr, mask=mask, other=0.0) + sums, mask=mask)
