"""What the table promises to the compiler about alignment, which the interpreter does not see."""

import itertools

import pytest
import torch

from ngpt.kernels.retract import MatrixShard
from ngpt.kernels.retract.table import Tables


def tables_of(cols: int, low: int, high: int, offset: int, unit_dim: int) -> Tables:
    values = torch.empty(high - low + offset)[offset:]
    assert values.data_ptr() % 16 == 4 * offset % 16
    return Tables([MatrixShard(values, low, 6, cols, unit_dim)], run=lambda cols: 2, strip=lambda height, aligned: 4, cut_strip=4)


@pytest.mark.parametrize("cols", [5, 8])
@pytest.mark.parametrize("unit_dim", [0, 1])
def test_entries_that_are_called_aligned_are(cols, unit_dim):
    """Every address a multiple of 16, every count of columns and position one of 4."""
    seen = 0
    for low, high, offset in itertools.product(range(2 * cols), range(3 * cols, 6 * cols + 1), range(4)):
        tables = tables_of(cols, low, high, offset, unit_dim)
        groups = [entries for (_, aligned), entries in [*tables.rows.items(), *tables.columns.items()] if aligned]
        for entries in groups + ([tables.cut_columns[True]] if True in tables.cut_columns else []):
            counts = entries[:, [2]] if unit_dim == 1 else entries[:, 2:6]
            assert not (entries[:, 0] % 16).any() and not (counts % 4).any()
            seen += 1
    assert (seen > 0) == (cols == 8)


@pytest.mark.parametrize(("low", "high"), [(0, 48), (8, 48), (4, 44)])
@pytest.mark.parametrize("unit_dim", [0, 1])
def test_what_could_be_aligned_is(low, high, unit_dim):
    tables = tables_of(8, low, high, 0, unit_dim)
    assert all(aligned for _, aligned in [*tables.rows, *tables.columns]) and set(tables.cut_columns) <= {True}
    assert len(tables.rows) + len(tables.columns) + len(tables.cut_columns) == 1


@pytest.mark.parametrize("unit_dim", [0, 1])
def test_every_element_is_in_the_table_once(unit_dim):
    """Whole rows, pieces of rows and strips of columns, wherever the shard starts and ends."""
    cols = 5
    for low, high in itertools.combinations_with_replacement(range(6 * cols + 1), 2):
        values = torch.empty(high - low)
        shard = MatrixShard(values, low, 6, cols, unit_dim)
        tables = Tables([shard], run=lambda cols: 2, strip=lambda height, aligned: 4, cut_strip=4)
        found = []
        for entries in tables.rows.values():
            found += [address + 4 * i for address, rows, columns in entries.tolist() for i in range(rows * columns)]
        found += [address + 4 * i for address, length, _ in tables.lines.tolist() for i in range(length)]
        for entries in [*tables.columns.values(), *tables.cut_columns.values()]:
            for address, rows, columns, column, first, last, _ in entries.tolist():
                strip = itertools.product(range(rows), range(column, min(column + 4, columns)))
                found += [address + 4 * (r * columns + c) for r, c in strip if first <= r * columns + c < last]
        assert sorted(found) == [values.data_ptr() + 4 * i for i in range(high - low)]
