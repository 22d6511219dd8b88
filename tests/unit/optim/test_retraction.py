"""Retraction of whole and sharded matrices against a direct fp64 normalisation of the whole matrix."""

import itertools

import pytest
import torch

from megatron_ext.optim.retraction import addresses_of
from ngpt.optim.retraction import MatrixShard, Retraction, is_marked, mark, retract_shards_, retract_weights_, shards_of

SHAPES = [(5, 7), (1, 9), (9, 1), (6, 4)]
FP32_ROUNDING = 2**-24  # of a correctly rounded value, relative


def random_weight(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(4)))


def fp32_error(terms: int) -> float:
    """Relative, of an entry over its vector's norm in fp32: half of the sum's, in any order, and a few more roundings."""
    return (terms / 2 + 4) * FP32_ROUNDING


def half_a_unit(wanted: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half of the unit in the last place that `dtype` has at each value."""
    return torch.ldexp(torch.full_like(wanted, torch.finfo(dtype).eps / 4), torch.frexp(wanted).exponent)


def unit(matrix: torch.Tensor, unit_dim: int) -> torch.Tensor:
    wide = matrix.double()
    return wide / wide.square().sum(unit_dim, keepdim=True).add(1e-12).sqrt()


@pytest.mark.parametrize("unit_dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_shards_of_any_cut_become_the_normalised_matrix(shape, unit_dim):
    """Every way to cut two matrices into two ranks' contiguous shards, with the all-reduce played by a sum over both ranks."""
    rows, cols = shape
    generator = torch.Generator().manual_seed(rows * 10 + cols)
    for cut, other_cut in itertools.product(range(rows * cols + 1), (0, 3, 10)):
        first, second = torch.randn(rows, cols, generator=generator), torch.randn(2, 5, generator=generator)
        wanted, wanted_second = unit(first, unit_dim), unit(second, 1 - unit_dim)
        ranks = [
            [shard(first, slice(0, cut), unit_dim), shard(second, slice(0, other_cut), 1 - unit_dim)],
            [shard(first, slice(cut, None), unit_dim), shard(second, slice(other_cut, None), 1 - unit_dim)],
        ]
        sums = []  # first pass: what each rank brings to the all-reduce
        for shards in ranks:
            copies = [MatrixShard(s.values.clone(), s.start, s.rows, s.cols, s.unit_dim) for s in shards]
            retract_shards_(copies, lambda x, sums=sums: sums.append(x.clone()))
        for shards in ranks:
            retract_shards_(shards, lambda x, sums=sums: x.copy_(sums[0] + sums[1]))
        torch.testing.assert_close(first.double(), wanted, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(second.double(), wanted_second, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unit_dim", [0, 1])
def test_stacked_matrices_are_normalised_each_on_its_own_whatever_the_cut(unit_dim):
    """Three matrices in one weight, cut into two ranks' contiguous shards."""
    stacked = random_weight(3 * 4, 5)
    mark(stacked, unit_dim, num_matrices=3)
    wanted = torch.cat([unit(matrix, unit_dim) for matrix in stacked.detach().chunk(3)])
    for cut in range(stacked.numel() + 1):
        flat = stacked.detach().flatten().clone()
        ranks = [shards_of(stacked, flat[:cut], 0), shards_of(stacked, flat[cut:], cut)]
        assert [[(shard.rows, shard.cols) for shard in shards] for shards in ranks] == [[(4, 5)] * 3] * 2
        sums = []
        for part in ([0, cut], [cut, None]):
            retract_shards_(shards_of(stacked, flat[slice(*part)].clone(), part[0]), lambda x, sums=sums: sums.append(x.clone()))
        for shards in ranks:
            retract_shards_(shards, lambda x, sums=sums: x.copy_(sums[0] + sums[1]))
        torch.testing.assert_close(flat.view(12, 5).double(), wanted, rtol=1e-6, atol=1e-7)


def shard(matrix: torch.Tensor, piece: slice, unit_dim: int) -> MatrixShard:
    return MatrixShard(matrix.view(-1)[piece], piece.start, *matrix.shape, unit_dim=unit_dim)


@pytest.mark.parametrize("unit_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_weights_of_any_dtype_are_normalised_in_fp32(unit_dim, dtype):
    weight = torch.nn.Parameter((random_weight(33, 65).data * 1e-3).to(dtype))
    wanted = unit(weight.data, unit_dim)
    mark(weight, unit_dim)
    retract_weights_([weight])
    assert weight.dtype == dtype
    bound = half_a_unit(wanted, dtype) + fp32_error(weight.size(unit_dim)) * wanted.abs()
    assert ((weight.data.double() - wanted).abs() <= bound).all()


def test_unmarked_weights_are_left_alone():
    weight = random_weight(4, 4)
    before = weight.data.clone()
    retract_weights_([weight])
    assert not is_marked(weight) and torch.equal(weight.data, before)


def test_a_zero_vector_stays_zero_and_the_rest_is_normalised():
    weight = random_weight(3, 8)
    weight.data[1] = 0
    mark(weight, 1)
    retract_weights_([weight])
    norms = weight.data.double().norm(dim=1)
    assert norms[1] == 0 and (norms[[0, 2]] - 1).abs().max() < 1e-6


def test_retraction_twice_moves_nothing_beyond_rounding():
    weight = random_weight(16, 64)
    mark(weight, 1)
    retract_weights_([weight])
    once = weight.data.clone()
    retract_weights_([weight])
    torch.testing.assert_close(weight.data, once, rtol=2 * fp32_error(64), atol=0)  # the norm of each time is off by as much


def sixteen_bit(master: torch.Tensor) -> torch.nn.Parameter:
    """A parameter as Megatron's optimizers leave it: their fp32 master is an attribute."""
    weight = torch.nn.Parameter(master.detach().bfloat16())
    mark(weight, 1)
    weight.main_param = master
    return weight


@pytest.mark.parametrize("way", ["nothing", "other memory of the master", "another master", "other memory of the parameter"])
def test_retraction_follows_masters_that_move(way):
    """A plan is made once, and again when a master lies elsewhere; the memory that it left is not written any more."""
    weights = [sixteen_bit(random_weight(5, 7).detach()), random_weight(5, 7)]
    mark(weights[1], 1)
    found = []

    def masters() -> list[torch.Tensor]:
        return [weights[0].main_param, weights[1].data]

    def find_shards() -> list[MatrixShard]:
        found.append(1)
        return [MatrixShard(master.view(-1), 0, 5, 7, unit_dim=1) for master in masters()]

    retraction = Retraction(find_shards, addresses_of(weights))
    retraction()
    old = masters()
    if way == "other memory of the master":
        old[0] = old[0].detach()
        weights[0].main_param.data = random_weight(5, 7).data
    elif way == "another master":
        weights[0].main_param = random_weight(5, 7).detach()
    elif way == "other memory of the parameter":
        weights[1].data = random_weight(5, 7).data
    for x in {x.data_ptr(): x for x in [*old, *masters()]}.values():
        x.mul_(2)
    retraction()
    for x, left in zip(masters(), old, strict=True):
        assert (x.norm(dim=1) - 1).abs().max() < 1e-6
        assert x.data_ptr() == left.data_ptr() or (left.norm(dim=1) - 2).abs().max() < 1e-6
    assert len(found) == 1 + (way != "nothing")


def test_a_retraction_starts_every_step_from_new_sums():
    weight = random_weight(3, 4).detach()
    retraction = Retraction(lambda: [MatrixShard(weight.view(-1), 0, 3, 4, unit_dim=0)], lambda: [weight.data_ptr()], lambda sums: None)
    for factor in (1.0, 3.0, 0.5):
        wanted = unit(weight.mul_(factor), 0)
        retraction()
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-6, atol=0)
