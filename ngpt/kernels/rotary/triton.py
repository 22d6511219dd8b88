"""Launch the Triton kernels, on CUDA or in Triton's interpreter. Functions as in `eager`, for tensors with elements."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ngpt.kernels.launch import Launcher
from ngpt.kernels.normalize import EPSILON
from ngpt.kernels.rotary.kernels import backward_kernel, forward_kernel
from ngpt.kernels.rows import Tiling, as_rows

# A tile's elements are pairs: each is two numbers of a head.
FORWARD = Tiling(warps=1, elements=8, resident=24)
BACKWARD = Tiling(warps=1, elements=8, resident=24, stages=3)


def forward(
    mixed: Tensor, heads: int, groups: int, angles: Tensor | None, scale: Tensor | None, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As the package says."""
    x, lead = as_rows(mixed), mixed.shape[:2]
    tokens, width = x.size(0), x.size(1) // (heads + 2 * groups)
    q, k, v = (x.new_empty(*lead, number, width) for number in (heads, groups, groups))
    inverse_norms = None if scale is None else x.new_empty(heads + groups, tokens, dtype=torch.float32)
    plan = _plan(FORWARD, tokens, heads, groups, width, _rotated(angles), scale is not None, x.device)
    angles, scale = _rows_of(angles), _dense(scale)
    specialized = lead[1], x.stride(0), 1 if angles is None else angles.stride(0)
    plan.launch(plan.grid, (x, angles, scale, q, k, v, inverse_norms), (tokens, float(factor)), specialized)
    return q, k, v, inverse_norms


def backward(
    grads: tuple[Tensor, Tensor, Tensor],
    mixed: Tensor | None,
    angles: Tensor | None,
    scale: Tensor | None,
    factor: float,
    inverse_norms: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """As the package says."""
    grads = tuple(grad if grad.stride(3) == 1 or grad.size(3) == 1 else grad.contiguous() for grad in grads)
    (sequence, batch, heads, width), groups = grads[0].shape, grads[1].size(2)
    tokens, x = sequence * batch, None if mixed is None else as_rows(mixed)
    grad_x = grads[0].new_empty(sequence, batch, (heads + 2 * groups) * width)
    plan = _plan(BACKWARD, tokens, heads, groups, width, _rotated(angles), scale is not None, grad_x.device, backward=True)
    partial = None if scale is None else grad_x.new_empty(plan.grid[0], heads * width, dtype=torch.float32)
    angles, scale = _rows_of(angles), _dense(scale)
    strides = [stride for grad in grads for stride in grad.stride()[:3]]
    specialized = batch, *strides, 1 if x is None else x.stride(0), 1 if angles is None else angles.stride(0)
    tensors = *grads, x, angles, scale, inverse_norms, grad_x, partial
    plan.launch(plan.grid, tensors, (tokens, float(factor)), specialized)
    return grad_x, None if partial is None else partial.sum(0)


@dataclass(frozen=True)
class _Plan:
    """A kernel and its grid: tiles of tokens, and parts of the groups."""

    launch: Launcher
    grid: tuple[int, int, int]


@functools.cache
def _launcher(tiling: Tiling, heads: int, groups: int, width: int, rotated: int, normalized: bool, shares: int, backward: bool) -> Launcher:
    rows, columns, warps = tiling.tile(-(-width // 2))
    constants = dict(WIDTH=width, ROTATED=rotated, NORMALIZED=normalized, HEADS=heads, EACH=heads // groups, SHARES=shares)
    constants |= dict(R=rows, C=columns, STAGES=tiling.stages, num_warps=warps)
    return Launcher(backward_kernel, **constants) if backward else Launcher(forward_kernel, EPSILON=EPSILON, **constants)


@functools.lru_cache(maxsize=256)
def _plan(
    tiling: Tiling,
    tokens: int,
    heads: int,
    groups: int,
    width: int,
    rotated: int,
    normalized: bool,
    device: torch.device,
    backward: bool = False,
) -> _Plan:
    rows, _, warps = tiling.tile(-(-width // 2))
    tiles, most = -(-tokens // rows), tiling.programs(warps, device)
    # With few tokens more programs share a tile's groups. Each of them computes the cosines and sines.
    shares = next((n for n in range(1, groups + 1) if not groups % n and tiles * n >= most), groups)
    return _Plan(_launcher(tiling, heads, groups, width, rotated, normalized, shares, backward), (tiles, shares, 1))


def _rotated(angles: Tensor | None) -> int:
    return 0 if angles is None else angles.size(-1)


def _rows_of(angles: Tensor | None) -> Tensor | None:
    return None if angles is None else as_rows(angles)


def _dense(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.contiguous()
