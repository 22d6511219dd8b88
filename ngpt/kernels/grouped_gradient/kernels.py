"""Device code of the experts' weight gradients. Sums in fp32, each in one program and one order.

A program owns a square tile of one expert's total and walks over the expert's rows, ROWS at a time; neighbouring programs have the same
expert, whose rows the L2 cache then serves. Offsets of rows and experts are 64 bits, those within a tile 32.
"""

import triton
import triton.language as tl

from ngpt.kernels.device import INTERPRETED


@triton.jit
def _add_rows(sums, dy_ptr, x_ptr, first, end, N, K, n, k, ROWS: tl.constexpr, LAST: tl.constexpr):
    """sums + dy^T x over rows first .. first + ROWS. LAST: rows from `end` on do not count."""
    row = tl.arange(0, ROWS)[:, None]
    dy_mask, x_mask = n < N, k < K
    if LAST:
        here = first + row < end
        dy_mask, x_mask = dy_mask & here, x_mask & here
    start = tl.cast(first, tl.int64)
    dy = tl.load(dy_ptr + start * N + row * N + n, mask=dy_mask, other=0.0)
    x = tl.load(x_ptr + start * K + row * K + k, mask=x_mask, other=0.0)
    if INTERPRETED:  # the interpreter would multiply bf16 as integers
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
    EDGE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """total[e] += dy_e^T x_e; an expert without rows is not touched.

    N = UNIT * `n_units` and K = UNIT * `k_units`; a UNIT of 8 tells the compiler that a thread may load 16 bytes at once.
    """
    N, K = n_units * UNIT, k_units * UNIT
    expert = tl.program_id(1)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    if begin < end:
        tile = tl.program_id(0)
        n = tile // tl.cdiv(K, EDGE) * EDGE + tl.arange(0, EDGE)
        k = tile % tl.cdiv(K, EDGE) * EDGE + tl.arange(0, EDGE)
        last = end - (end - begin) % ROWS  # where an incomplete block starts
        sums = tl.zeros((EDGE, EDGE), tl.float32)
        for first in tl.range(begin, last, ROWS, num_stages=STAGES):
            sums = _add_rows(sums, dy_ptr, x_ptr, first, end, N, K, n[None, :], k[None, :], ROWS, False)
        if last < end:
            sums = _add_rows(sums, dy_ptr, x_ptr, last, end, N, K, n[None, :], k[None, :], ROWS, True)
        mask = (n < N)[:, None] & (k < K)[None, :]
        at_ptr = total_ptr + tl.cast(expert, tl.int64) * N * K + n[:, None] * K + k[None, :]
        tl.atomic_add(at_ptr, sums, mask=mask, sem="relaxed")  # each number once: the L2 cache adds, and the program does not wait
