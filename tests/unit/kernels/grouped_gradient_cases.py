"""What the experts' weight gradients are tested with, in the interpreter and on a GPU: inputs between guards, and the truth."""

from itertools import accumulate, pairwise

import torch
from row_cases import kernels_for
from torch import Tensor

from ngpt.kernels.grouped_gradient import add_gradients

SPARE = 3  # rows behind the last group
GUARD = 12345.0  # stands on both sides of the totals
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # total, dy, x, ends


def make_inputs(sizes: list[int], n: int, k: int, dtype: torch.dtype, generator: torch.Generator, offset: int = 0) -> Inputs:
    """Random totals. Where a group has no rows they are NaN and -0.0, which adding 0 would change. Rows behind the last group are NaN.

    Args:
        offset: of the total from a multiple of 16 bytes, in elements.
    """
    device, rows = generator.device, sum(sizes)
    numbers = len(sizes) * n * k
    memory = torch.full((numbers + 8 + offset,), GUARD, device=device)
    total = memory[4 + offset : 4 + offset + numbers].view(len(sizes), n, k).normal_(generator=generator)
    total[[size == 0 for size in sizes]] = torch.where(torch.arange(k, device=device) % 2 == 0, -0.0, torch.nan)
    dy, x = (torch.randn(rows + SPARE, width, generator=generator, device=device).to(dtype) for width in (n, k))
    dy[rows:], x[rows:] = torch.nan, torch.nan
    return total, dy, x, torch.tensor(list(accumulate(sizes)), dtype=torch.int32, device=device)


def problems_of_expert(actual: Tensor, total: Tensor, dy: Tensor, x: Tensor) -> str | None:
    """What is wrong about one expert's new total. Every addition errs by its result's last bit at most; partial sums are about as large
    as the root of the sum of the products' squares."""
    if not len(dy):
        return None if torch.equal(actual.view(torch.int32), total.view(torch.int32)) else "touched without rows"
    dy, x = dy.double(), x.double()
    wanted = total + dy.t() @ x
    size = (dy.square().t() @ x.square()).sqrt()
    off = (actual - wanted).abs() > 2.0**-23 * (len(dy) * size + wanted.abs())
    off |= ~actual.isfinite()
    return f"{off.sum()} of {off.numel()} numbers are off, first {off.nonzero()[0].tolist()}" if off.any() else None


def check(inputs: Inputs, *devices: str) -> list[str]:
    """Problems of the totals after one call, each against fp64; and of a second run's bits. The kernel is for these devices."""
    total, dy, x, ends = inputs
    found = [run(inputs, *devices) for _ in range(2)]
    lines = [] if torch.equal(*(once.view(torch.int32) for once in found)) else ["other bits the second time"]
    for expert, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
        problem = problems_of_expert(found[0][expert], total[expert], dy[begin:end], x[begin:end])
        lines += [f"expert {expert}: {problem}"] if problem else []
    return lines


def run(inputs: Inputs, *devices: str, calls: int = 1) -> Tensor:
    """The totals after this many calls, as a copy of the same alignment, once the guards are checked."""
    total, *others = inputs
    start, numbers = total.storage_offset(), total.numel()
    memory = total.new_empty(0).set_(total.untyped_storage()).clone()
    copy = memory[start : start + numbers].view(total.shape)
    with kernels_for(*devices):
        for _ in range(calls):
            add_gradients(copy, *others)
    assert memory[:start].eq(GUARD).all() and memory[start + numbers :].eq(GUARD).all(), "written outside of the totals"
    return copy
