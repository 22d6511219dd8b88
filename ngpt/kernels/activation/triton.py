"""Launch the Triton kernels, on CUDA or in Triton's interpreter. Functions as in `eager`, for tensors with elements."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ngpt.kernels.activation.form import Form
from ngpt.kernels.activation.kernels import FUNCTIONS, backward_kernel, forward_kernel, sum_pieces_kernel
from ngpt.kernels.device import OWN
from ngpt.kernels.launch import Launcher
from ngpt.kernels.normalize.eager import EPSILON
from ngpt.kernels.normalize.triton import in_parts, shared_sums
from ngpt.kernels.rows import MAX_WIDTH, Tiling, as_rows, dense_like, height_of_pieces

FORWARD = Tiling(warps=4, elements=16, resident=16, stages=3, widest=32)
BACKWARD = Tiling(warps=4, elements=16, resident=16, stages=3)

_STRIP = 4096
_SUM_COLUMNS = 128
_sum_pieces = Launcher(sum_pieces_kernel, R=16, C=_SUM_COLUMNS)


@dataclass(frozen=True)
class Groups:
    """The pieces of all groups in the form that `kernels` expects, cut for the backward pass, which has fewer programs.

    Attributes:
        table: int32, on the device.
        pieces: how many.
    """

    table: Tensor
    pieces: int


def forward(u: Tensor, scale: Tensor, factor: float, form: Form, sizes: list[int] | None) -> tuple[Tensor, Tensor | None, Groups | None]:
    """As the package says."""
    groups = None if sizes is None else make_groups(u, scale, u.size(-1) // (2 if form.gated else 1), sizes)
    return *activate(u, scale, factor, form, groups), groups


def activate(u: Tensor, scale: Tensor, factor: float, form: Form, groups: Groups | None) -> tuple[Tensor, Tensor | None]:
    """The forward pass where the groups are on the device already."""
    u_rows = as_rows(u)
    rows, width = u_rows.size(0), u_rows.size(1) // (2 if form.gated else 1)
    y = torch.empty(*u.shape[:-1], width, dtype=u.dtype, device=u.device)
    inverse_norm = torch.empty(rows, dtype=torch.float32, device=u.device) if form.normalize else None
    sums = shared_sums(u, form.group) if form.normalize else None
    tensors = u_rows, scale.contiguous(), y, inverse_norm, sums, None if groups is None else groups.table

    def launch(part: int) -> None:
        plan = _plan(FORWARD, width, _loads(u, form), _constants(form, part, groups), u.device)
        height, pieces = plan.cut(rows) if groups is None else (0, groups.pieces)
        plan.launch((pieces, plan.strips, 1), tensors, (rows, height, float(factor)), (u_rows.stride(0),))

    in_parts(launch, sums, form.group)
    return y, inverse_norm


def backward(
    grad: Tensor, u: Tensor, scale: Tensor, factor: float, form: Form, inverse_norm: Tensor | None, groups: Groups | None
) -> tuple[Tensor, Tensor]:
    """As the package says."""
    grad_rows, u_rows, grad_u = as_rows(grad), as_rows(u), dense_like(u)
    rows, whole = u_rows.shape
    width = grad_rows.size(1)
    loads = _loads(u, form) + grad.element_size()
    own = _plan(BACKWARD, width, loads, _constants(form, OWN.value, groups), u.device, backward=True)
    height, pieces = own.cut(rows) if groups is None else (0, groups.pieces)
    partial = torch.empty(pieces, whole, dtype=torch.float32, device=u.device)
    sums = shared_sums(u, form.group) if form.normalize else None
    tensors = grad_rows, u_rows, scale.contiguous(), inverse_norm, grad_u, sums, partial, None if groups is None else groups.table

    def launch(part: int) -> None:
        plan = _plan(BACKWARD, width, loads, _constants(form, part, groups), u.device, backward=True)
        plan.launch((pieces, plan.strips, 1), tensors, (rows, height, float(factor)), (grad_rows.stride(0), u_rows.stride(0)))

    in_parts(launch, sums, form.group)
    if groups is None:
        return grad_u, partial.sum(0)
    grad_scale = torch.empty(scale.shape, dtype=torch.float32, device=u.device)
    _sum_pieces((-(-whole // _SUM_COLUMNS), scale.size(0), 1), (partial, groups.table, grad_scale), (groups.pieces,), (whole,))
    return grad_u, grad_scale


@dataclass(frozen=True)
class _Plan:
    """How rows of one width are handled: the kernel's launcher, rows of a tile, tiles of a row, and the largest number of pieces."""

    launch: Launcher
    rows: int
    strips: int
    most: int

    def cut(self, rows: int) -> tuple[int, int]:
        """Rows of a piece; and how many pieces."""
        height = height_of_pieces(rows, self.rows, self.most)
        return height, -(-rows // height)


def _constants(form: Form, part: int, groups: Groups | None) -> tuple[tuple[str, object], ...]:
    constants = dict(FUNCTION=FUNCTIONS[form.function], GATED=form.gated, NORM=form.normalize, SUMS=part, GROUPED=groups is not None)
    return tuple(constants.items())


def _loads(u: Tensor, form: Form) -> int:
    """Bytes of u that a program loads for one feature of the result."""
    return u.element_size() * (2 if form.gated else 1)


@functools.cache
def _plan(
    tiling: Tiling, width: int, loads: int, constants: tuple[tuple[str, object], ...], device: torch.device, backward: bool = False
) -> _Plan:
    rows, columns, warps = tiling.tile(_of_program(width))
    stages = tiling.stages_for(loads * rows * columns, device)
    kernel, own = (backward_kernel, {}) if backward else (forward_kernel, {"EPSILON": EPSILON})
    launch = Launcher(kernel, **dict(constants), **own, WIDTH=width, R=rows, C=columns, STAGES=stages, num_warps=warps)
    strips = -(-width // columns)
    return _Plan(launch, rows, strips, max(1, tiling.programs(warps, device) // strips))


def _of_program(width: int) -> int:
    """Columns that a program works on: all, or a strip where rows are too wide for that and have no norm."""
    return width if width <= MAX_WIDTH else _STRIP


def make_groups(u: Tensor, scale: Tensor, width: int, sizes: list[int]) -> Groups:
    """Cut every group into pieces of about equal work; one copy to the device, from pinned memory, and nothing waits for it.

    Raises:
        ValueError: the sizes are not those of u's rows and of the scale's groups.
    """
    if len(sizes) != scale.size(0) or sum(sizes) != u.size(0):
        raise ValueError(
            f"sizes: {len(sizes)} groups of {sum(sizes)} rows in all, but scale has {scale.size(0)} groups and u {u.size(0)} rows. "
            "Pass the number of rows of each group, in their order."
        )
    of_tile, _, warps = BACKWARD.tile(_of_program(width))
    height = height_of_pieces(u.size(0), of_tile, BACKWARD.programs(warps, u.device))
    rows_of = np.asarray(sizes, dtype=np.int32)
    pieces_of = -(-rows_of // height)
    starts, ends = np.append(0, pieces_of.cumsum()), rows_of.cumsum()
    group = np.repeat(np.arange(len(sizes)), pieces_of)
    first = (ends - rows_of)[group] + (np.arange(len(group)) - starts[group]) * height
    host = torch.empty(3 * len(group) + len(starts), dtype=torch.int32, pin_memory=u.is_cuda)
    np.concatenate((group, first, np.minimum(first + height, ends[group]), starts), out=host.numpy(), casting="same_kind")
    return Groups(host.to(u.device, non_blocking=True), len(group))
