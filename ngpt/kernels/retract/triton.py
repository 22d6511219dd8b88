"""Launch the Triton kernels, on CUDA or in Triton's interpreter."""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ngpt.kernels.device import GIVE, OWN, TAKE
from ngpt.kernels.launch import Launcher
from ngpt.kernels.normalize.eager import EPSILON
from ngpt.kernels.retract.kernels import columns_kernel, lines_kernel, rows_kernel
from ngpt.kernels.retract.shards import MatrixShard
from ngpt.kernels.retract.table import Tables
from ngpt.kernels.rows import Tiling

# `resident` bounds the programs that walk over columns, and so how much the L2 cache has to keep.
ROWS = Tiling(warps=2, elements=32, resident=0, stages=3)
RUN = 2048  # elements of the rows that a program takes
HELD = Tiling(warps=16, elements=64, resident=64)  # columns whole in registers ...
HELD_COLUMNS = 32  # ... where the tile is at least so wide
WALKED = Tiling(warps=16, elements=32, resident=16, stages=3)  # other columns of matrices that are whole here
WALKED_COLUMNS = 32
CUT = Tiling(warps=4, elements=16, resident=64)
CUT_COLUMNS = 64
LINE = 1024


class Plan:
    """See `Plan` of the package. Sums of squares are kept only of vectors that are cut; the others' stay zero."""

    def __init__(self, shards: list[MatrixShard]):
        device = shards[0].values.device
        self._shards = shards  # keeps alive what the tables point to
        tables = Tables(shards, _run, _strip, CUT_COLUMNS)
        self._sums = torch.zeros(tables.num_sums, dtype=torch.float32, device=device)
        self._whole: list[Callable[[], None]] = []
        self._give: list[Callable[[], None]] = []
        self._take: list[Callable[[], None]] = []
        for (columns, aligned), entries in tables.rows.items():
            launch = _rows(ROWS, columns, aligned, device)
            self._whole.append(functools.partial(launch, (len(entries), 1, 1), (_on(device, entries),), ()))
        for (height, aligned), entries in tables.columns.items():
            tiling, shape, is_held = _columns_of(height, aligned)
            self._whole.append(self._walk(tiling, shape, OWN.value, is_held, aligned, _on(device, entries)))
        for aligned, entries in tables.cut_columns.items():
            table = _on(device, entries)
            for step, part in ((self._give, GIVE), (self._take, TAKE)):
                step.append(self._walk(CUT, _fill(CUT, CUT_COLUMNS), part.value, False, aligned, table))
        if len(tables.lines):
            table = _on(device, tables.lines)
            for step, part in ((self._give, GIVE), (self._take, TAKE)):
                step.append(functools.partial(_lines(LINE, part.value), (len(table), 1, 1), (table, self._sums), ()))

    def __call__(self, all_reduce: Callable[[Tensor], object] | None) -> None:
        for launch in self._whole:
            launch()
        if all_reduce is not None:
            self._sums.zero_()  # other ranks' vectors, and what the last step left
        for launch in self._give:
            launch()
        if all_reduce is not None:
            all_reduce(self._sums)
        for launch in self._take:
            launch()

    def _walk(self, tiling: Tiling, shape: tuple[int, int], part: int, is_held: bool, aligned: bool, table: Tensor) -> Callable[[], None]:
        launch = _columns(tiling, shape, part, is_held, aligned)
        programs = min(len(table), tiling.programs(tiling.warps, table.device))
        return functools.partial(launch, (programs, 1, 1), (table, self._sums), (len(table),))


def _on(device: torch.device, entries: np.ndarray) -> Tensor:
    return torch.from_numpy(entries).to(device)


def _run(cols: int) -> int:
    """Rows that a program takes: whole tiles."""
    height, _, _ = ROWS.tile(cols)
    return max(1, RUN // (cols * height)) * height


def _strip(height: int, aligned: bool) -> int:
    """Columns that a program takes of a matrix with this many rows, a multiple of 4."""
    return _columns_of(height, aligned)[1][1]


def _columns_of(height: int, aligned: bool) -> tuple[Tiling, tuple[int, int], bool]:
    """Tiling and tile for columns of this many rows (a power of two), and whether registers hold them.

    With loads of 4 bytes they do not: each load has an address, which takes registers.
    """
    columns = min(HELD.warps * 32 * HELD.elements // height, 128)
    is_held = aligned and columns >= HELD_COLUMNS
    return (HELD, (height, columns), True) if is_held else (WALKED, _fill(WALKED, WALKED_COLUMNS), False)


def _fill(tiling: Tiling, columns: int) -> tuple[int, int]:
    """The tile of this many columns."""
    return max(1, tiling.warps * 32 * tiling.elements // columns), columns


@functools.cache
def _rows(tiling: Tiling, width: int, aligned: bool, device: torch.device) -> Launcher:
    height, columns, warps = tiling.tile(width)
    stages = tiling.stages_for(4 * height * columns, device)
    return Launcher(rows_kernel, EPSILON=EPSILON, R=height, C=columns, ALIGNED=aligned, STAGES=stages, num_warps=warps)


@functools.cache
def _lines(columns: int, part: int) -> Launcher:
    return Launcher(lines_kernel, EPSILON=EPSILON, C=columns, SUMS=part)


@functools.cache
def _columns(tiling: Tiling, shape: tuple[int, int], part: int, is_held: bool, aligned: bool) -> Launcher:
    switches = dict(SUMS=part, HELD=is_held, ALIGNED=aligned, STAGES=tiling.stages)
    return Launcher(columns_kernel, EPSILON=EPSILON, R=shape[0], C=shape[1], **switches, num_warps=tiling.warps)
