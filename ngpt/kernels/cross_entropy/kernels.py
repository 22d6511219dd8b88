"""Device code of the cross entropy. fp32 in registers; there logits are in units of log 2, which makes exp one instruction.

Launched with `enable_fp_fusion=False`: both passes must round x * units alike, or a large logit less the largest would not be zero.
"""

import triton
import triton.language as tl

from ngpt.kernels.device import rounded

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["rows", "columns", "factor"])
def forward_kernel(
    x_ptr,
    scale_ptr,
    targets_ptr,
    largest_ptr,
    total_ptr,
    picked_ptr,
    rows,
    columns,
    factor,
    width,
    x_stride,
    SCALED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """R rows, C columns at a time. Every E neighbouring columns of a tile share a running maximum and sum, joined only at the end."""
    first = tl.cast(tl.program_id(0), tl.int64) * R
    r = tl.arange(0, R)
    here = first + r < rows
    tile = x_ptr + first * x_stride + r[:, None, None] * x_stride
    place = tl.arange(0, C // E)[None, :, None] * E + tl.arange(0, E)[None, None, :]
    place = tl.max_contiguous(tl.multiple_of(place, (1, 1, E)), (1, 1, E))
    units = factor * LOG2_E
    largest = tl.full((R, C // E), -float("inf"), tl.float32)
    total = tl.zeros((R, C // E), tl.float32)
    for start in tl.range(0, columns, C, num_stages=STAGES):
        inside = start + place < width  # elements of alignment that the compiler knows; it does not know that of columns
        x = tl.load(tile + start + place, mask=inside & here[:, None, None], other=0.0).to(tl.float32)
        if SCALED:
            x *= tl.load(scale_ptr + start + place, mask=inside, other=0.0) * units
        else:
            x *= units
        x = tl.where(start + place < columns, x, -float("inf"))
        highest = tl.maximum(largest, tl.max(x, 2))
        shift = tl.where(highest == -float("inf"), 0.0, highest)  # nothing has been seen
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(x - shift[:, :, None]), 2)
        largest = highest
    highest = tl.max(largest, 1)
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    tl.store(largest_ptr + first + r, highest, mask=here)
    tl.store(total_ptr + first + r, tl.sum(total * tl.exp2(largest - shift[:, None]), 1), mask=here)
    target = tl.load(targets_ptr + first + r, mask=here, other=-1)
    counts = (target >= 0) & (target < columns)
    picked = tl.load(x_ptr + (first + r) * x_stride + target, mask=counts, other=0.0).to(tl.float32)
    if SCALED:
        picked *= tl.load(scale_ptr + target, mask=counts, other=0.0) * units
    else:
        picked *= units
    tl.store(picked_ptr + first + r, picked, mask=here)


@triton.jit(do_not_specialize=["rows", "columns", "height", "factor"])
def backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    behind_ptr,
    targets_ptr,
    largest_ptr,
    total_ptr,
    partial_ptr,
    rows,
    columns,
    height,
    factor,
    width,
    x_stride,
    SCALED: tl.constexpr,
    OTHER: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """C columns of `height` rows, R at a time; the gradient of x overwrites x. A row of partials [pieces, width] is the gradient of the
    scale from one piece. OTHER: the gradient of the scaled logits goes through the vector at behind_ptr instead of the scale.
    """
    r = tl.arange(0, R)
    column = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    inside, counts = column < width, column < columns
    scale = tl.full((1, C), 1.0, tl.float32)
    if SCALED:
        scale = tl.load(scale_ptr + column, mask=counts, other=0.0)
    units = scale * (factor * LOG2_E)
    behind = scale * factor
    if OTHER:
        behind = tl.load(behind_ptr + column, mask=counts, other=0.0)
    begin = tl.program_id(1) * height
    grad_scale = tl.zeros((R, C), tl.float32)
    for row in tl.range(begin, tl.minimum(begin + height, rows), R, num_stages=STAGES):
        first = tl.cast(row, tl.int64)
        here = (first + r < rows) & (row + r < begin + height)
        mask = inside & here[:, None]
        tile = x_ptr + first * x_stride + r[:, None] * x_stride + column
        x = tl.where(counts, tl.load(tile, mask=mask, other=0.0).to(tl.float32), 0.0)
        grad = tl.load(grad_ptr + first + r, mask=here, other=0.0)[:, None]
        largest = tl.load(largest_ptr + first + r, mask=here, other=0.0)[:, None]
        total = tl.load(total_ptr + first + r, mask=here, other=1.0)[:, None]
        target = tl.load(targets_ptr + first + r, mask=here, other=-1)[:, None]
        probability = tl.where(counts, tl.exp2(x * units - largest) * (1.0 / total), 0.0)
        grad *= probability - tl.where((target == column) & counts, 1.0, 0.0)
        if SCALED:
            grad_scale += grad * x
        tl.store(tile, rounded(grad * behind, x_ptr), mask=mask)
    if SCALED:
        place = tl.program_id(1).to(tl.int64) * width + column
        tl.store(partial_ptr + place, tl.sum(grad_scale, 0)[None, :] * factor, mask=inside)
