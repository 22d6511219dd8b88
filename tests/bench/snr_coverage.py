"""How often the intervals of `ngpt analyze --what snr` hold the mean figure of text that was not read.

    python tests/bench/snr_coverage.py [--sets 400] [--batches 8] [--samples 32]

A batch is one GEMM of fresh rows against weights that stay, quantised by the reference quantiser; the truth is the mean of the figure over
all output entries of all batches of all sets.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from ngpt.model_analysis.intervals import text_interval
from ngpt.model_analysis.snr import figures_of_powers
from ngpt.precision import QuantizerSpec, quantize
from ngpt.precision.diagnostics import Draw, _drawn, powers_of_rows

ROWS, COLUMNS, K = 256, 128, 64
FIGURES = ("product_snr_db", "dot_snr_db", "signal_correlation", "noise_correlation", "averaging_gain_db")


def normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator)


# The rows of a batch: what tokens of a batch have in common, how their lengths differ.
CASES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "independent rows": lambda g: normal(ROWS, K, g),
    "a direction of the batch": lambda g: normal(ROWS, K, g) + normal(1, K, g),
    "log-normal rows, common part": lambda g: normal(ROWS, 1, g).exp() * (0.4 + normal(ROWS, K, g)),
    "8 groups of rows": lambda g: normal(8, K, g).repeat_interleave(ROWS // 8, dim=0) + normal(ROWS, K, g),
}


def figures(powers: Tensor) -> Tensor:
    found = figures_of_powers(powers, K)
    return torch.stack([found[name] for name in FIGURES])


def coverage(case: str, sets: int, batches: int, samples: int) -> tuple[list[float], float]:
    """Shares of sets by figure, and the mean signal correlation."""
    generator = torch.Generator().manual_seed(1)
    w = normal(COLUMNS, K, generator) + 0.2
    w_hat = quantize(w, QuantizerSpec((16, 16))).dequantize()
    truths, estimates = [], []
    for number in range(sets * batches):
        x = CASES[case](generator)
        x_hat = quantize(x, QuantizerSpec()).dequantize()
        every = Draw(torch.arange(ROWS), torch.ones(ROWS, 1)), Draw(torch.arange(COLUMNS), torch.ones(COLUMNS, 1))
        truths.append(figures(powers_of_rows(every, (x, w), (x_hat, w_hat))))
        drawing = torch.Generator().manual_seed(number)
        draws = _drawn(x, samples, drawing), _drawn(w, samples, drawing)
        exact, quantised = ((a[draws[0].rows], b[draws[1].rows]) for a, b in ((x, w), (x_hat, w_hat)))
        estimates.append(figures(powers_of_rows(draws, exact, quantised)))
    truth = torch.stack(truths).mean(dim=0)
    held = []
    for place, whole in enumerate(truth):
        intervals = [text_interval(one.tolist()) for one in torch.stack(estimates)[:, place].view(sets, batches)]
        held.append(sum(found["lower"] <= whole <= found["upper"] for found in intervals) / sets)
    return held, float(truth[FIGURES.index("signal_correlation")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=400)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32, help="rows drawn of each operand")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"coverage in %, {options.sets} sets of {options.batches} batches, standard error {100 * (0.0475 / options.sets) ** 0.5:.1f}")
    print("| case |", " | ".join(FIGURES), "| rho(z) |")
    for case in CASES:
        held, rho = coverage(case, options.sets, options.batches, options.samples)
        print(f"| {case} |", " | ".join(f"{100 * share:.1f}" for share in held), f"| {rho:.4f} |", flush=True)


if __name__ == "__main__":
    main()
