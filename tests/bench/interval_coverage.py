"""How often the 95 % intervals of `product_figures` hold the figure of the whole GEMM.

    python tests/bench/interval_coverage.py [--sets 4000] [--sets-before 1000] [--samples 64] [--cases NAME...] [--out FILE.json]

A case is one pair of matrices, quantised by the reference quantiser; a set is one draw of rows from both, with its intervals. The truth is
the figure over all output entries. Beside it the previous method: rows drawn with equal chances, percentiles of resampled rows and columns.
The case `few rows` has fresh matrices for every set, all of whose rows are taken; the truth is that of the population they come from.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from ngpt.precision import QuantizerSpec, quantize
from ngpt.precision.diagnostics import CONFIDENCE, PRODUCT_FIGURES, SAMPLES, _powers, _resampled, product_figures

ROWS, COLUMNS, K = 2048, 1024, 64
FEW_ROWS = "few rows"
Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # a, b, a_hat, b_hat


def normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def row_scales(spread: float, rows: int, generator: torch.Generator) -> Tensor:
    """Log-normal: `spread` is the standard deviation of the logarithm of a row's scale."""
    return (spread * normal(rows, 1, generator)).exp()


def grouped(rows: int, generator: torch.Generator) -> Tensor:
    """64 groups of rows, as tokens of a sequence: a group shares a direction, which is half of its power, and a scale."""
    each = rows // 64
    shared, scale = normal(64, K, generator), row_scales(0.7, 64, generator)
    return (scale * shared).repeat_interleave(each, dim=0) + scale.repeat_interleave(each, dim=0) * normal(rows, K, generator)


def student(rows: int, generator: torch.Generator) -> Tensor:
    """Elements of Student's t distribution with 4 degrees of freedom."""
    chi_square = torch.stack([normal(rows, K, generator).square() for _ in range(4)]).sum(dim=0)
    return normal(rows, K, generator) / (chi_square / 4).sqrt()


def outliers(rows: int, generator: torch.Generator) -> Tensor:
    """Two of the channels are ten times as large as the others."""
    return normal(rows, K, generator) * torch.tensor([10.0] * 2 + [1.0] * (K - 2), dtype=torch.float64)


CASES: dict[str, tuple[Callable[[torch.Generator], Tensor], Callable[[torch.Generator], Tensor]]] = {
    "gaussian": (lambda g: normal(ROWS, K, g), lambda g: normal(COLUMNS, K, g)),
    "common part": (lambda g: 0.4 + normal(ROWS, K, g), lambda g: 0.4 + normal(COLUMNS, K, g)),
    "log-normal rows": (lambda g: row_scales(1, ROWS, g) * normal(ROWS, K, g), lambda g: normal(COLUMNS, K, g)),
    "log-normal rows, common part": (
        lambda g: row_scales(1, ROWS, g) * (0.4 + normal(ROWS, K, g)),
        lambda g: row_scales(0.7, COLUMNS, g) * (0.4 + normal(COLUMNS, K, g)),
    ),
    "rows with a mean each": (
        lambda g: normal(ROWS, 1, g) + normal(ROWS, K, g),
        lambda g: 0.5 * normal(COLUMNS, 1, g) + normal(COLUMNS, K, g),
    ),
    "groups of rows": (lambda g: grouped(ROWS, g), lambda g: grouped(COLUMNS, g)),
    "Student's t elements": (lambda g: student(ROWS, g), lambda g: student(COLUMNS, g)),
    "outlier channels": (lambda g: outliers(ROWS, g), lambda g: normal(COLUMNS, K, g)),
    FEW_ROWS: (lambda g: row_scales(0.4, ROWS, g) * (0.4 + normal(ROWS, K, g)),) * 2,
}


def operands(case: str, seed: int = 1) -> Operands:
    """The matrices of a case and their quantised forms."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (make(generator).float() for make in CASES[case])
    return a, b, *(quantize(matrix, QuantizerSpec()).dequantize() for matrix in (a, b))


def sets_of(case: str, matrices: Operands, samples: int, sets: int) -> Iterator[Operands]:
    """What each set draws from: the case's matrices, or so many of their rows that all are taken."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(sets):
        if case != FEW_ROWS:
            yield matrices
            continue
        rows, columns = (torch.randperm(matrix.size(0), generator=generator)[:samples] for matrix in matrices[:2])
        a, b, a_hat, b_hat = matrices
        yield a[rows], b[columns], a_hat[rows], b_hat[columns]


def bounds(matrices: Operands, samples: int, seed: int) -> Tensor:
    """[2, 4] lower and upper bounds in the order of PRODUCT_FIGURES."""
    figures = product_figures(*matrices, samples=samples, seed=seed)
    return torch.stack([torch.stack([figures[name + suffix] for name in PRODUCT_FIGURES]) for suffix in ("_lower", "_upper")])


def previous_bounds(matrices: Operands, samples: int, seed: int, resamples: int = 200) -> Tensor:
    """`bounds` as they were until 2026-11-28."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(matrix.size(0), generator=generator)[:samples] for matrix in matrices[:2])
    a, b, a_hat, b_hat = (matrix[index].double() for matrix, index in zip(matrices, (rows, columns) * 2, strict=True))
    powers = _powers(a, b, a_hat, b_hat)
    counts = (_resampled(count, resamples, generator) for count in powers.shape[1:])
    signal, noise, signal_terms, noise_terms = torch.einsum("pij,ri,rj->pr", powers, *counts)
    snrs = [10 * (signal_terms / noise_terms).log10(), 10 * (signal / noise).log10()]
    figures = torch.stack([*snrs, *((dot / terms - 1) / (K - 1) for dot, terms in ((signal, signal_terms), (noise, noise_terms)))])
    ordered, tail = figures.sort(dim=1).values, (1 - CONFIDENCE) / 2 * (resamples - 1)
    return torch.stack([ordered[:, round(tail)], ordered[:, round(resamples - 1 - tail)]])


METHODS = {"now": bounds, "before": previous_bounds}


def coverage(case: str, sets: int, samples: int, method: Callable[[Operands, int, int], Tensor]) -> dict[str, dict[str, float]]:
    """By figure: share of the sets whose interval holds the truth, shares of those entirely above and below it, mean width."""
    matrices = operands(case)
    whole = product_figures(*matrices, samples=ROWS, resamples=1)
    truth = torch.stack([whole[name] for name in PRODUCT_FIGURES])
    lower, upper = torch.stack([method(m, samples, seed) for seed, m in enumerate(sets_of(case, matrices, samples, sets))]).unbind(dim=1)
    above, below, widths = lower > truth, upper < truth, upper - lower
    shares = {"coverage": ~(above | below), "above": above, "below": below, "width": widths}
    means = {name: values.double().mean(dim=0).tolist() for name, values in shares.items()}
    return {figure: {name: values[i] for name, values in means.items()} for i, figure in enumerate(PRODUCT_FIGURES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=4000)
    parser.add_argument("--sets-before", type=int, default=1000, help="of the previous method (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="rows drawn from each matrix (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    error = (CONFIDENCE * (1 - CONFIDENCE) / options.sets) ** 0.5
    print(f"coverage of 95 % intervals in % over {options.sets} sets, now (before); standard error {error:.2%}")
    print("| case |", " | ".join(PRODUCT_FIGURES), "|")
    results: dict[str, dict] = {}
    sets = {"now": options.sets, "before": options.sets_before}
    for case in options.cases:
        start = time.monotonic()
        results[case] = {name: coverage(case, sets[name], options.samples, method) for name, method in METHODS.items()}
        results[case]["seconds"] = time.monotonic() - start
        shares = ([100 * results[case][method][figure]["coverage"] for method in METHODS] for figure in PRODUCT_FIGURES)
        print(f"| {case} |", " | ".join(f"{now:.1f} ({before:.1f})" for now, before in shares), "|", flush=True)
    if options.out:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.processor() or platform.machine(),
            "shape": [ROWS, COLUMNS, K],
            "seeds": "matrices 1; sets 0, 1, ...",
            "sets": sets,
            "samples": options.samples,
        }
        options.out.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
