"""What the retraction's kernels are tested with, in the interpreter and on a GPU: shards of any cut between guards, and the truth."""

from contextlib import suppress
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ngpt.kernels.retract import MatrixShard, make_plan

GUARD = 12345.0  # stands on both sides of every shard: a sum that reads it is far off, and a write changes it
ERROR = 2e-6  # relative, of an entry: rounding of a sum of some hundred terms in a row, of a root, and of a product


def random_matrix(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Vectors of different lengths along both dimensions."""
    device = generator.device
    matrix = torch.randn(rows, cols, generator=generator, device=device)
    sizes = [torch.rand(*shape, generator=generator, device=device) + 0.5 for shape in ((rows, 1), (1, cols))]
    return matrix * sizes[0] * sizes[1]


def unit(matrix: Tensor, unit_dim: int) -> Tensor:
    """The truth, in fp64."""
    wide = matrix.double()
    return wide / wide.square().sum(unit_dim, keepdim=True).add(1e-12).sqrt()


def problems(actual: Tensor, matrix: Tensor, unit_dim: int) -> list[str]:
    """What is wrong about a retracted matrix: entries that are off, each relative to its own true value."""
    wanted = unit(matrix, unit_dim)
    off = (actual.double() - wanted).abs() > ERROR * wanted.abs()
    off |= ~actual.isfinite()
    place = f"{tuple(matrix.shape)} along {unit_dim}"
    return [f"{place}: {off.sum()} of {off.numel()} entries, first {off.nonzero()[0].tolist()}"] if off.any() else []


class _Stopped(Exception):
    """A rank waits for the others' sums."""


class Ranks:
    """Matrices cut among ranks that take turns on this device.

    Args:
        matrices: (matrix, unit_dim); copied.
        cuts: of each matrix, where ranks meet in its flat form; the same number for all, ranks - 1.
        offset: of the shards from a multiple of 16 bytes, in elements.
    """

    def __init__(self, matrices: list[tuple[Tensor, int]], cuts: list[tuple[int, ...]], offset: int = 0):
        self.shards: list[list[MatrixShard]] = [[] for _ in range(len(cuts[0]) + 1)]
        self.shapes = [matrix.shape for matrix, _ in matrices]
        self.memory: list[tuple[Tensor, int, int]] = []
        for (matrix, unit_dim), places in zip(matrices, cuts, strict=True):
            flat = matrix.reshape(-1)
            for shards, (low, high) in zip(self.shards, pairwise((0, *places, flat.numel())), strict=True):
                memory = torch.full((high - low + offset + 8,), GUARD, device=matrix.device)
                values = memory[4 + offset : 4 + offset + high - low]
                values.copy_(flat[low:high])
                self.memory.append((memory, 4 + offset, 4 + offset + high - low))
                shards.append(MatrixShard(values, low, *matrix.shape, unit_dim=unit_dim))

    def retract(self) -> list[Tensor]:
        """The matrices, retracted, after a look at the guards.

        Plans of cut matrices run up to the all-reduce, and then whole, with workspaces of NaN.
        """
        if len(self.shards) == 1:
            make_plan(self.shards[0])(None)
        else:
            before = [[shard.values.clone() for shard in shards] for shards in self.shards]
            plans, sums, given = [make_plan(shards) for shards in self.shards], [], []

            def stop(x: Tensor) -> None:
                sums.append(x)
                given.append(x.clone())
                raise _Stopped

            for plan in plans:
                with suppress(_Stopped):
                    plan(stop)
            for shards, values in zip(self.shards, before, strict=True):
                for shard, value in zip(shards, values, strict=True):
                    shard.values.copy_(value)
            total = torch.stack(given).sum(0)

            def add(x: Tensor, brought: Tensor) -> None:
                assert torch.equal(x.nan_to_num(7.0), brought.nan_to_num(7.0)), "another sum from the same values"
                x.copy_(total)

            for plan, workspace, brought in zip(plans, sums, given, strict=True):
                workspace.fill_(torch.nan)
                plan(partial(add, brought=brought))
        for memory, low, high in self.memory:
            assert memory[:low].eq(GUARD).all() and memory[high:].eq(GUARD).all(), "written outside of a shard"
        pieces = zip(*self.shards, strict=True)
        return [torch.cat([shard.values for shard in shards]).view(shape) for shards, shape in zip(pieces, self.shapes, strict=True)]


def check(matrices: list[tuple[Tensor, int]], cuts: list[tuple[int, ...]] | None = None, offset: int = 0) -> list[str]:
    """Problems of the retracted matrices, whole or cut."""
    found = Ranks(matrices, cuts or [()] * len(matrices), offset).retract()
    return [line for actual, (matrix, dim) in zip(found, matrices, strict=True) for line in problems(actual, matrix, dim)]


def has_other_bits(matrices: list[tuple[Tensor, int]], cuts: list[tuple[int, ...]]) -> bool:
    """Whether a second run gives other bits."""
    first, second = Ranks(matrices, cuts).retract(), Ranks(matrices, cuts).retract()
    return not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def every_cut(rows: int, cols: int, generator: torch.Generator) -> tuple[list[tuple[Tensor, int]], list[tuple[int, ...]]]:
    """A matrix for each way to cut it once, along both dimensions. In some cuts a third rank gets a part inside one row."""
    size, matrices, cuts = rows * cols, [], []
    places = [(cut, cut) for cut in range(size + 1)]
    places += [(0, 1), (1, cols - 1), (cols + 1, 2 * cols - 1), (cols, 2 * cols), (1, 2 * cols + 1), (size - 1, size), (0, size)]
    for low, high in places:
        for unit_dim in (0, 1):
            matrices.append((random_matrix(rows, cols, generator), unit_dim))
            cuts.append((min(low, high), max(low, high)))
    return matrices, cuts


def assert_vectors_of_any_size(device: str, length: int, generator: torch.Generator) -> None:
    """Zero stays zero; tiny ones are multiplied by 1 / sqrt(epsilon); the ones beside them are what they are alone."""
    for unit_dim in (0, 1):
        matrix = random_matrix(length, 12, generator) if unit_dim == 0 else random_matrix(12, length, generator)
        vectors = matrix.unbind(1 - unit_dim)
        for vector, size in zip(vectors[2:], (0.0, 1e-20, 1e-6, 1e16), strict=False):
            vector.mul_(size)
        cuts = [None, [(matrix.numel() // 2 + 1,)]]
        for cut in cuts:
            assert not check([(matrix, unit_dim)], cut)
            (found,) = Ranks([(matrix, unit_dim)], cut or [()]).retract()
            assert not found.select(1 - unit_dim, 2).any()


def assert_broken_entries_show(generator: torch.Generator) -> None:
    """An entry that is NaN makes its vector NaN, whole and cut, and no other."""
    for unit_dim in (0, 1):
        for cuts in ([()], [(17,)]):
            matrix = random_matrix(5, 8, generator)
            matrix[2, 3] = torch.nan
            (found,) = Ranks([(matrix, unit_dim)], cuts).retract()
            broken = torch.zeros(5, 8, dtype=torch.bool, device=matrix.device)
            broken.select(1 - unit_dim, 3 if unit_dim == 0 else 2).fill_(True)
            assert torch.equal(found.isnan(), broken)
