"""Which program works where: the shards as tables of int64 for the kernels, made on the host."""

from collections.abc import Callable

import numpy as np

from ngpt.kernels.retract.shards import MatrixShard
from ngpt.kernels.rows import MAX_WIDTH, power_of_two

BYTES = 4  # of an fp32 number


class Tables:
    """Entries for each kernel, grouped by what the kernel is compiled for.

    Attributes:
        rows: (columns of the tile, aligned) -> [programs, 3]: runs of whole rows.
        lines: [programs, 3]: pieces of rows whose rest other ranks have, and rows that are wider than a tile may be.
        columns: (rows of the matrix rounded up to a power of two, aligned) -> [strips, 7]: matrices that are whole here.
        cut_columns: aligned -> [strips, 7]: the others.
        num_sums: vectors of all matrices.

    Args:
        run: how many rows of so many columns a program takes.
        strip: how many columns it takes of a matrix, by its rows (a power of two) and by alignment; a multiple of 4.
        cut_strip: the same for matrices that are not whole here; a multiple of 4.
    """

    def __init__(self, shards: list[MatrixShard], run: Callable[[int], int], strip: Callable[[int, bool], int], cut_strip: int):
        self._rows: dict[tuple[int, bool], list[np.ndarray]] = {}
        self._lines: list[tuple[int, int, int]] = []
        self._columns: dict[tuple[int, bool], list[np.ndarray]] = {}
        self._cut_columns: dict[bool, list[np.ndarray]] = {}
        self._run, self._strip, self._cut_strip = run, strip, cut_strip
        self.num_sums = 0
        for shard in shards:
            assert shard.values.is_contiguous() and shard.cols < 2**31 and shard.rows < 2**31
            if shard.values.numel():
                (self._add_rows if shard.unit_dim == 1 else self._add_columns)(shard, self.num_sums)
            self.num_sums += shard.num_vectors
        self.rows = {key: np.concatenate(found) for key, found in self._rows.items()}
        self.lines = np.array(self._lines, dtype=np.int64).reshape(-1, 3)
        self.columns = {key: np.concatenate(found) for key, found in self._columns.items()}
        self.cut_columns = {key: np.concatenate(found) for key, found in self._cut_columns.items()}

    def _add_rows(self, shard: MatrixShard, place: int) -> None:
        address, cols, start, end = shard.values.data_ptr(), shard.cols, shard.start, shard.start + shard.values.numel()

        def add_line(low: int, high: int) -> None:
            if high > low:
                self._lines.append((address + (low - start) * BYTES, high - low, place + low // cols))

        first, last = -(-start // cols), end // cols  # the whole rows
        if first > last:
            return add_line(start, end)  # inside one row
        add_line(start, first * cols)
        add_line(last * cols, end)
        if cols > MAX_WIDTH:
            for row in range(first, last):
                add_line(row * cols, (row + 1) * cols)
        elif last > first:
            address += (first * cols - start) * BYTES
            run = self._run(cols)
            begin = np.arange(0, last - first, run, dtype=np.int64)
            found = np.stack((address + begin * cols * BYTES, np.minimum(last - first - begin, run), np.full_like(begin, cols)), 1)
            self._rows.setdefault((power_of_two(cols), _are_aligned(address, cols)), []).append(found)

    def _add_columns(self, shard: MatrixShard, place: int) -> None:
        cols, skipped = shard.cols, shard.start // shard.cols  # rows before the shard's first
        low, high = shard.start - skipped * cols, shard.start - skipped * cols + shard.values.numel()
        address, rows = shard.values.data_ptr() - low * BYTES, -(-high // cols)
        is_whole, height = shard.values.numel() == shard.rows * cols, power_of_two(shard.rows)
        aligned = _are_aligned(address, cols, low, high)
        width = self._strip(height, aligned) if is_whole else self._cut_strip
        column = np.arange(0, cols, width, dtype=np.int64)
        same = [np.full_like(column, number) for number in (address, rows, cols, low, high)]
        found = np.stack((*same[:3], column, *same[3:], place + column), 1)
        if is_whole:
            self._columns.setdefault((height, aligned), []).append(found)
        else:
            self._cut_columns.setdefault(aligned, []).append(found)


def _are_aligned(address: int, *counts: int) -> bool:
    """Whether 16 bytes can be loaded at once everywhere."""
    return address % 16 == 0 and all(count % 4 == 0 for count in counts)
