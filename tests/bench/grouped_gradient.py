"""The experts' weight gradients, added in fp32, on a GPU: the kernel beside torch's grouped product in bf16 with an addition behind it.

    python tests/bench/grouped_gradient.py --out FILE.json

Refuses to measure where tests/gpu/test_grouped_gradient.py is red. The lower bound is the longer of the products at 800 TFLOP/s and the
bytes at the card's copy bandwidth: totals of experts with rows read and written, 8 bytes a number, operands read once. GPU times are
medians by device events, host times means of calls in a row.

Prediction and figures: ngpt/kernels/grouped_gradient/README.md.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from bench_tools import copy_bandwidth, median_ms, write_results
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from ngpt.kernels.grouped_gradient import add_gradients  # noqa: E402

FLOPS_PER_S = 800e12  # of dense bf16 products, at best
REPEATS, HOST_CALLS = 10, 30
TESTS = Path(__file__).parents[1] / "gpu" / "test_grouped_gradient.py"
SIZES = [(64, 1856, 1024), (64, 1024, 1856), (16, 1856, 2688), (16, 2688, 1856)]  # experts, N, K
ROWS = [49152, 98304]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]).returncode:
        sys.exit("The kernel is wrong here: nothing is measured.")
    copy = copy_bandwidth() * 1e9
    print(f"copy {copy / 1e9:.0f} GB/s", flush=True)
    rows = [measure(size, count, split, copy) for size in SIZES for count in ROWS for split in (even, uneven)]
    write_results(options.out, "grouped_gradient", copy, rows)


def even(rows: int, experts: int) -> list[int]:
    """Groups of one size."""
    return [rows // experts] * experts


def uneven(rows: int, experts: int) -> list[int]:
    """Groups as a router may leave them, an eighth of them empty."""
    weights = torch.randn(experts, generator=torch.Generator().manual_seed(5)).mul_(0.8).exp_()
    weights[::8] = 0
    sizes = (weights / weights.sum() * rows).int().tolist()
    sizes[-1] += rows - sum(sizes)
    return sizes


def make_inputs(size: tuple[int, int, int], sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Total, dy, x and ends."""
    experts, n, k = size
    dy, x = (torch.randn(sum(sizes), width, dtype=torch.bfloat16, device="cuda") for width in (n, k))
    return torch.zeros(experts, n, k, device="cuda"), dy, x, torch.tensor(list(accumulate(sizes)), dtype=torch.int32, device="cuda")


def measure(size: tuple[int, int, int], count: int, split: Callable[[int, int], list[int]], copy: float) -> dict:
    """One size: our times, torch's, and the bound."""
    experts, n, k = size
    sizes = split(count, experts)
    total, dy, x, ends = make_inputs(size, sizes)
    flops = 2 * count * n * k
    moved = 8 * n * k * sum(rows > 0 for rows in sizes) + 2 * count * (n + k)
    bound = max(flops / FLOPS_PER_S, moved / copy) * 1e3

    def product() -> Tensor:
        return torch.nn.functional.grouped_mm(dy.t(), x, offs=ends)

    ms = median_ms(lambda: add_gradients(total, dy, x, ends), REPEATS)
    row: dict = dict(experts=experts, n=n, k=k, rows=count, split=split.__name__, largest=max(sizes), bytes_moved=moved, median_ms=ms)
    row |= dict(tflops=flops / ms / 1e9, share_of_bound=bound / ms, host_ms=host_ms(lambda: add_gradients(total, dy, x, ends)))
    row |= dict(torch_ms=median_ms(lambda: total.add_(product()), REPEATS), torch_product_ms=median_ms(product, REPEATS))
    name = f"E {experts}  N {n}  K {k}  T {count} {split.__name__:6s}"
    figures = f"{ms:6.3f} ms {row['tflops']:4.0f} TFLOP/s {100 * row['share_of_bound']:3.0f} % of bound  host {row['host_ms']:.3f} ms"
    print(f"{name}  {figures}  torch {row['torch_ms']:6.3f} ms, product alone {row['torch_product_ms']:6.3f}", flush=True)
    return row


def host_ms(call: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / HOST_CALLS * 1e3


if __name__ == "__main__":
    main()
