"""The experts' weight gradients, added in fp32, on a GPU: the kernel beside torch's grouped product in bf16 with an addition behind it.

    python tests/bench/grouped_gradient.py --out FILE.json [--sweep]

Refuses to measure where tests/gpu/test_grouped_gradient.py is red. The lower bound is the longer of the products at 800 TFLOP/s and the
bytes at the card's copy bandwidth: totals of experts with rows read and written, 8 bytes a number, operands read once. GPU times are
medians by device events, host times those of the call alone with an idle device. --sweep tries other tilings first, compiled in processes
of their own, and prints the best of each size; what is measured afterwards has the module's.

Prediction, written before measuring: ngpt/kernels/grouped_gradient/README.md.
"""

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from pathlib import Path

import torch
from bench_tools import copy_bandwidth, median_ms, write_results
from torch import Tensor
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).parents[2]))
from ngpt.kernels.grouped_gradient import add_gradients  # noqa: E402
from ngpt.kernels.grouped_gradient import triton as kernel  # noqa: E402

FLOPS_PER_S = 800e12  # of dense bf16 products, at best
REPEATS, HOST_CALLS = 10, 30
TESTS = Path(__file__).parents[1] / "gpu" / "test_grouped_gradient.py"
SIZES = [(64, 1856, 1024), (64, 1024, 1856), (16, 1856, 2688), (16, 2688, 1856)]  # experts, N, K
ROWS = [49152, 98304]
CANDIDATES = [
    kernel.Tiling(short=short, long=long, rows=rows, warps=warps, stages=stages, **switches)
    for short, long, rows, warps, stages, switches in (
        (128, 256, 64, 8, 3, {}),
        (128, 256, 64, 8, 4, {}),
        (128, 256, 64, 8, 4, {"peeled": True}),
        (128, 256, 64, 8, 3, {"atomic": False}),
        (128, 256, 32, 8, 6, {}),
        (128, 256, 128, 8, 2, {}),
        (128, 128, 64, 4, 3, {}),
        (128, 128, 64, 4, 3, {"peeled": True}),
        (128, 128, 64, 4, 3, {"atomic": False}),
        (128, 128, 32, 4, 6, {}),
        (128, 128, 64, 8, 3, {}),
        (64, 256, 64, 4, 2, {}),
        (64, 256, 32, 4, 5, {}),
        (64, 256, 64, 8, 4, {}),
    )
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]).returncode:
        sys.exit("The kernel is wrong here: nothing is measured.")
    copy = copy_bandwidth() * 1e9
    print(f"copy {copy / 1e9:.0f} GB/s", flush=True)
    if options.sweep:
        sweep()
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
    row["tiling"] = str(kernel.TILING)
    name = f"E {experts}  N {n}  K {k}  T {count} {split.__name__:6s}"
    figures = f"{ms:6.3f} ms {row['tflops']:4.0f} TFLOP/s {100 * row['share_of_bound']:3.0f} % of bound  host {row['host_ms']:.3f} ms"
    print(f"{name}  {figures}  torch {row['torch_ms']:6.3f} ms, product alone {row['torch_product_ms']:6.3f}", flush=True)
    return row


def host_ms(call: Callable[[], None]) -> float:
    times = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e3


def sweep() -> None:
    """Print the best tilings of each size."""
    with ProcessPoolExecutor(len(CANDIDATES), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_both_ways, CANDIDATES))
    shipped = kernel.TILING
    for size in SIZES:
        for split in (even, uneven):
            inputs, found = make_inputs(size, split(ROWS[0], size[0])), []
            for tiling in CANDIDATES:
                kernel.TILING = tiling
                try:
                    found.append((median_ms(lambda inputs=inputs: add_gradients(*inputs), repeats=5, warm_up=2), tiling))
                except OutOfResources:
                    continue
            for ms, tiling in sorted(found, key=lambda one: one[0])[:5]:
                print(f"E {size[0]}  N {size[1]}  K {size[2]} {split.__name__:6s} {ms:6.3f} ms: {tiling}", flush=True)
    kernel.TILING = shipped


def compile_both_ways(tiling: kernel.Tiling) -> None:
    """Leave the tiling's kernels, long along N and along K, in Triton's cache on disk."""
    kernel.TILING = tiling
    for n, k in ((tiling.long, tiling.short), (tiling.short, tiling.long)):
        try:
            add_gradients(*make_inputs((1, n, k), [64]))
        except OutOfResources:
            return
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
