"""The retraction's kernels on a GPU, at the matrices of the models, whole and cut, against fp64."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "kernels"))
from retract_cases import (  # noqa: E402
    assert_broken_entries_show,
    assert_vectors_of_any_size,
    check,
    every_cut,
    has_other_bits,
    problems,
    random_matrix,
)

from ngpt.kernels.retract import MatrixShard, make_plan  # noqa: E402
from ngpt.optim.retraction import Retraction  # noqa: E402

pytestmark = pytest.mark.gpu
# Of the dense model, the hybrids (their experts, router and Mamba projections), and odd ones; unit_dim behind the shape.
DENSE = [(3072, 2048, 1), (2048, 2048, 0), (6144, 2048, 1), (2048, 6144, 0), (131072, 2048, 1)]
HYBRID = [(64, 1024, 1), (1024, 1024, 0), (1024, 1024, 1), (6176, 1024, 1)]
HYBRID += [(1856, 2688, 1), (2688, 1856, 0), (2688, 4096, 0), (128, 2688, 1)]
ODD = [(1, 1, 0), (1, 2049, 1), (2049, 1, 0), (33, 2047, 1), (2047, 33, 0), (777, 130, 0), (5, 20000, 1), (5, 4097, 0)]


@pytest.mark.parametrize("offset", [0, 1])
def test_whole_matrices_in_one_plan(offset, generator):
    matrices = [(random_matrix(rows, cols, generator), dim) for rows, cols, dim in DENSE + HYBRID + ODD]
    assert not check(matrices, offset=offset)


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("moved", [0, 1], ids=["aligned", "odd"])
def test_cut_matrices_in_one_plan(offset, moved, generator):
    """Three ranks; cuts inside of rows."""
    shapes = DENSE[:4] + HYBRID + ODD[1:]
    matrices = [(random_matrix(rows, cols, generator), dim) for rows, cols, dim in shapes]
    cuts = [tuple(rows * cols * part // 20 * 4 + moved for part in (1, 3)) for rows, cols, _ in shapes]
    assert not check(matrices, cuts, offset)
    assert not has_other_bits(matrices, cuts)


@pytest.mark.parametrize(("shape", "offset"), [((3, 5), 0), ((4, 8), 0), ((3, 4), 2), ((5, 1030), 1)])
def test_shards_of_any_cut(shape, offset, generator):
    matrices, cuts = every_cut(*shape, generator) if shape[1] < 100 else some_cuts(*shape, generator)
    assert not check(matrices, cuts, offset)


def some_cuts(rows: int, cols: int, generator: torch.Generator):
    """As `every_cut`, of one row and a little more."""
    places = [*range(cols - 5, cols + 6), 1, 2, 3, 4, 5]
    matrices = [(random_matrix(rows, cols, generator), dim) for _ in places for dim in (0, 1)]
    return matrices, [(place, 3 * cols + 7) for place in places for _ in (0, 1)]


def test_whole_matrices_give_the_same_bits_twice(generator):
    matrices = [(random_matrix(rows, cols, generator), dim) for rows, cols, dim in DENSE + HYBRID]
    assert not has_other_bits(matrices, [()] * len(matrices))


@pytest.mark.parametrize("length", [33, 2048, 2688])
def test_vectors_of_any_size(length, generator):
    assert_vectors_of_any_size("cuda", length, generator)


def test_broken_entries_show(generator):
    assert_broken_entries_show(generator)


@pytest.mark.parametrize(("rows", "cols", "unit_dim"), [(2**20 + 64, 2048, 1), (2048, 2**20 + 1024, 0), (4096, 2**19 + 512, 0)])
@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "cut"])
def test_more_elements_than_32_bits_count(rows, cols, unit_dim, is_cut, generator):
    """The truth of some vectors at both ends. A cut shard is alone, and its last row is missing half."""
    matrix = torch.randn(rows, cols, generator=generator, device="cuda")
    size = rows * cols - (cols // 8 * 4 if is_cut else 0)
    left = torch.zeros(rows * cols, device="cuda")
    left[:size] = matrix.view(-1)[:size]
    left = left.view(rows, cols)
    places = [slice(0, 40), slice(-40, None)]
    tail = matrix.view(-1)[size:].clone()
    wanted = [left[place].clone() if unit_dim == 1 else left[:, place].clone() for place in places]
    make_plan([MatrixShard(matrix.view(-1)[:size], 0, rows, cols, unit_dim)])(None)
    assert torch.equal(matrix.view(-1)[size:], tail) and size > 2**31
    for place, part in zip(places, wanted, strict=True):
        found = (matrix[place] if unit_dim == 1 else matrix[:, place]).clone()
        found[part == 0] = 0  # not of the shard
        assert not problems(found, part, unit_dim)


def test_the_table_follows_storage_that_moves(generator):
    masters = [random_matrix(64, 2048, generator) for _ in range(3)]
    retraction = Retraction(
        lambda: [MatrixShard(master.view(-1), 0, 64, 2048, unit_dim=1) for master in masters],
        lambda: [master.data_ptr() for master in masters],
    )
    old = masters[1].detach()
    retraction()
    masters[1].data = torch.full((64, 2048), 3.0, device="cuda")
    before = old.clone()
    for _ in range(2):
        retraction()
        assert all((master.norm(dim=1) - 1).abs().max() < 1e-6 for master in masters) and torch.equal(old, before)
