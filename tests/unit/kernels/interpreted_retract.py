"""The retraction's Triton kernels in the interpreter. test_rows_triton.py runs this with TRITON_INTERPRET=1."""

import dataclasses
import weakref

import pytest
import torch
from retract_cases import assert_broken_entries_show, assert_vectors_of_any_size, check, every_cut, has_other_bits, random_matrix
from row_cases import kernels_for

from ngpt.kernels.retract import MatrixShard, eager, make_plan, table, triton
from ngpt.optim.retraction import Retraction

# One vector, odd numbers, several tiles of rows and of columns, columns that are held and that are walked, rows wider than a tile may be.
SHAPES = [(1, 1), (1, 9), (9, 1), (5, 7), (33, 12), (3, 70)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Small tiles, so that small matrices have several programs with several tiles each, and matrices of all kinds occur."""
    for name, resident in (("ROWS", 0), ("HELD", 3), ("WALKED", 3), ("CUT", 3)):
        tiling = dataclasses.replace(getattr(triton, name), warps=1, elements=4 if name == "HELD" else 2, resident=resident)
        monkeypatch.setattr(triton, name, tiling)
    for name, value in (("RUN", 128), ("HELD_COLUMNS", 4), ("WALKED_COLUMNS", 8), ("CUT_COLUMNS", 8), ("LINE", 16)):
        monkeypatch.setattr(triton, name, value)
    monkeypatch.setattr(table, "MAX_WIDTH", 48)
    with kernels_for("cpu"):
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("offset", [0, 1])
def test_whole_matrices_of_any_shape_in_one_plan(offset, generator):
    """At an offset nothing is aligned, and columns are walked."""
    assert not check([(random_matrix(*shape, generator), dim) for shape in SHAPES[2 * offset :] for dim in (0, 1)], offset=offset)


def test_shards_of_any_cut(generator):
    assert not check(*every_cut(3, 5, generator))


def test_long_shards(generator):
    """Of several tiles, of columns and of rows, aligned and not; rows wider than a tile may be. Twice the same bits."""
    shapes_and_cuts = [((30, 12), (100, 304)), ((30, 12), (99, 301)), ((4, 70), (135, 200))]
    matrices = [(random_matrix(*shape, generator), dim) for shape, _ in shapes_and_cuts for dim in (0, 1)]
    cuts = [cuts for _, cuts in shapes_and_cuts for _ in (0, 1)]
    assert not check(matrices, cuts)
    assert not has_other_bits(matrices[:2], cuts[:2])


def test_vectors_of_any_size(generator):
    assert_vectors_of_any_size("cpu", 33, generator)


def test_broken_entries_show(generator):
    assert_broken_entries_show(generator)


def test_a_pieces_norm_is_its_own_where_nobody_sums(generator):
    matrix = random_matrix(2, 8, generator)
    values = matrix.reshape(-1)[3:6].clone()
    make_plan([MatrixShard(values, 3, 2, 8, unit_dim=1)])(None)
    torch.testing.assert_close(values.double().norm().item(), 1.0, rtol=1e-6, atol=0)


def test_a_rank_without_a_share_takes_part(generator):
    """All of its shards are empty: it brings zeros."""
    seen = []
    plan = make_plan([MatrixShard(torch.empty(0), 0, 3, 4, unit_dim=dim) for dim in (0, 1)])
    plan(lambda x: seen.append(x.clone()))
    assert isinstance(plan, triton.Plan) and len(seen) == 1 and torch.equal(seen[0], torch.zeros(4 + 3))


def test_a_plan_keeps_the_memory_that_it_points_to():
    values = torch.ones(12)
    plan, memory = make_plan([MatrixShard(values, 0, 3, 4, unit_dim=1)]), weakref.ref(values)
    del values
    assert memory() is not None and plan


def test_doubles_go_through_plain_torch(generator):
    matrix = random_matrix(5, 7, generator).double()
    plan = make_plan([MatrixShard(matrix.view(-1), 0, 5, 7, unit_dim=0)])
    assert isinstance(plan, eager.Plan)
    plan(None)
    assert (matrix.norm(dim=0) - 1).abs().max() < 1e-12


def test_the_table_follows_storage_that_moves(generator):
    """If a plan worked on the old addresses, the new memory would keep its norms."""
    masters = [random_matrix(6, 4, generator) for _ in range(3)]
    found = []

    def find_shards() -> list[MatrixShard]:
        found.append(1)
        return [MatrixShard(master.view(-1), 0, 6, 4, unit_dim=1) for master in masters]

    retraction = Retraction(find_shards, lambda: [master.data_ptr() for master in masters])
    old = masters[1].detach()
    for moved in (False, False, True):
        if moved:
            masters[1].data = torch.full((6, 4), 3.0)
            before = old.clone()
        for master in masters:
            master.mul_(2)
        retraction()
        assert all((master.norm(dim=1) - 1).abs().max() < 1e-6 for master in masters)
    assert len(found) == 2 and torch.equal(old, before)
