"""The retraction of fp32 masters on a GPU: its kernels against the card's copy bandwidth, beside the batched torch operations before.

    python tests/bench/retraction.py --out FOLDER [--models dense hybrid cut] [--sweep]

Refuses to measure where tests/gpu/test_retraction.py is red. Bytes: every master is read once and written once, 8 an element; copy
bandwidth counts read and written bytes. GPU times are medians over replays of a CUDA graph; host times are those of the call alone, with
an idle device, addresses looked up and compared as in training. --sweep tries other tilings first, on the dense model's matrices.

Prediction, written before measuring (H200, copy 4.1 TB/s): dense, 10.0 GB: rows 95 % of copy, columns 80 %, 2.7 ms; before: 4.8 to 5.4.
Host of the hybrid 0.3 ms; before: 40.
"""

import argparse
import dataclasses
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_tools import copy_bandwidth, median_ms, median_seconds_in_graph, write_results
from torch import Tensor
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).parents[2]))
from megatron_ext.optim.retraction import addresses_of  # noqa: E402
from ngpt.kernels.normalize import EPSILON  # noqa: E402
from ngpt.kernels.retract import MatrixShard, make_plan  # noqa: E402
from ngpt.kernels.retract import triton as kernels  # noqa: E402
from ngpt.optim.retraction import Retraction  # noqa: E402

CALLS, REPLAYS, HOST_CALLS = 2, 7, 30
TESTS = Path(__file__).parents[1] / "gpu" / "test_retraction.py"
Shape = tuple[int, int, int]  # rows, columns, unit_dim
# conf/model/ngpt_1p2b.yaml: attention and MLP of 20 layers, embedding and head.
DENSE: list[Shape] = [(3072, 2048, 1), (2048, 2048, 0), (6144, 2048, 1), (2048, 6144, 0)] * 20 + [(131072, 2048, 1)] * 2
# conf/model/ngpt_hybrid_1p5b.yaml: 8 Mamba, 2 attention and 8 expert layers (router, shared expert), embedding and head; the experts.
HYBRID: list[Shape] = [(6176, 1024, 1), (1024, 2048, 0)] * 8 + [(2048, 1024, 1), (1024, 1536, 0)] * 2
HYBRID += [(64, 1024, 1), (2048, 1024, 1), (1024, 2048, 0)] * 8 + [(131072, 1024, 1)] * 2
EXPERTS: list[Shape] = [(1024, 1024, 1), (1024, 1024, 0)] * (8 * 64)
# What the inner optimizers of a model hold, and how many ranks share it.
MODELS: dict[str, tuple[list[list[Shape]], int]] = {"dense": ([DENSE], 1), "hybrid": ([HYBRID, EXPERTS], 1), "cut": ([DENSE], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="cut: the dense one's shard of rank 1 of 4")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]).returncode:
        sys.exit("The kernels are wrong here: nothing is measured.")
    copy = copy_bandwidth() * 1e9
    print(f"copy {copy / 1e9:.0f} GB/s")
    if options.sweep:
        sweep(copy)
    rows = []
    for model in options.models:
        for result in measure(model, copy):
            rows.append(result)
            figures = f"GPU {result['median_us'] / 1e3:7.3f} ms {100 * result['share_of_copy']:5.1f} % of copy"
            print(f"{model:7s} {result['case']:28s} {figures}  host {result['host_us'] / 1e3:7.3f} ms", flush=True)
    write_results(options.out, "retraction", copy, rows)


def make_masters(shapes: list[Shape], ranks: int) -> list[MatrixShard]:
    """Each matrix a tensor of its own; or rank 1's part of all of them one behind the other, as a distributed optimizer cuts a bucket."""
    sizes = [rows * cols for rows, cols, _ in shapes]
    part, shards = sum(sizes) // ranks, []
    first, last = (part, 2 * part) if ranks > 1 else (0, part)
    for start, size, shape in zip(itertools.accumulate(sizes, initial=0), sizes, shapes, strict=False):
        low, high = max(start, first) - start, min(start + size, last) - start
        shards.append(MatrixShard(torch.randn(max(0, high - low), device="cuda"), max(0, low) if high > low else 0, *shape))
    return shards


def measure(model: str, copy: float):
    """Results of a model's matrices: together, as before, and by kind."""
    groups, ranks = MODELS[model]
    shards = [make_masters(shapes, ranks) for shapes in groups]
    reduce = (lambda sums: None) if ranks > 1 else None  # the message itself is not measured
    retractions = [in_training(some, reduce) for some in shards]

    def ours(i: int = 0) -> None:
        for retraction in retractions:
            retraction()

    def torch_s(i: int = 0) -> None:
        for some in shards:
            foreach_retract(some, reduce)

    tilings = {name: str(getattr(kernels, name)) for name in ("ROWS", "RUN", "HELD", "HELD_COLUMNS", "WALKED", "WALKED_COLUMNS", "CUT")}
    for name, call in (("kernels", ours), ("batched torch, as before", torch_s)):
        yield row(model, name, sum(shards, []), call, copy) | ({"tilings": tilings} if call is ours else {})
    if ranks == 1:
        for unit_dim, name in ((1, "kernels, rows alone"), (0, "kernels, columns alone")):
            some = [shard for shard in sum(shards, []) if shard.unit_dim == unit_dim]
            plan = make_plan(some)
            yield row(model, name, some, lambda i=0, plan=plan: plan(None), copy)


def in_training(shards: list[MatrixShard], reduce: Callable[[Tensor], None] | None) -> Retraction:
    """As the hook makes it: BF16 parameters whose `main_param` are the masters."""
    params = []
    for shard in shards:
        param = torch.nn.Parameter(torch.empty(1, dtype=torch.bfloat16))
        param.main_param = shard.values
        params.append(param)
    return Retraction(lambda: shards, addresses_of(params), reduce)


def row(model: str, case: str, shards: list[MatrixShard], call: Callable, copy: float) -> dict:
    moved = 8 * sum(shard.values.numel() for shard in shards)
    host = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
    seconds = median_seconds_in_graph(call, CALLS, REPLAYS)
    result = dict(model=model, case=case, matrices=len(shards), bytes_moved=moved, median_us=seconds * 1e6)
    return result | dict(share_of_copy=moved / seconds / copy, host_us=statistics.median(host) * 1e6)


@torch.no_grad()
def foreach_retract(shards: list[MatrixShard], all_reduce: Callable[[Tensor], None] | None) -> None:
    """What retracted until this package: batched torch operations over lists that each step makes anew."""
    sizes = [shard.num_vectors for shard in shards]
    square_sums = torch.zeros(sum(sizes), dtype=torch.float32, device=shards[0].values.device)
    turns: tuple[list[tuple[Tensor, Tensor, int]], ...] = ([], [], [])
    for shard, sums in zip(shards, square_sums.split(sizes), strict=True):
        for turn, (block, vectors) in zip(turns, shard.pieces(), strict=False):
            turn.append((block, sums[vectors], shard.unit_dim))
    for turn in filter(None, turns):
        squares = [torch.linalg.vector_norm(block, dim=unit_dim) for block, _, unit_dim in turn]
        torch._foreach_mul_(squares, squares)
        torch._foreach_add_([sums for _, sums, _ in turn], squares)
    if all_reduce is not None:
        all_reduce(square_sums)
    square_sums.add_(EPSILON).rsqrt_()
    for turn in filter(None, turns):
        torch._foreach_mul_([block for block, _, _ in turn], [factors.unsqueeze(unit_dim) for _, factors, unit_dim in turn])


def sweep(copy: float) -> None:
    """Try tilings on the dense model's rows and columns and print the best; what is measured afterwards has those of the module again."""
    rows = [
        {"ROWS": dict(warps=w, elements=e, stages=s), "RUN": run}
        for w, e, s, run in itertools.product((2, 4, 8), (8, 16, 32), (1, 2, 3), (2048, 8192, 16384, 65536))
    ]
    held = [
        {"HELD": dict(warps=w, elements=e, resident=most), "HELD_COLUMNS": 4}
        for w, e, most in itertools.product((4, 8, 16, 32), (16, 32, 64), (32, 64))
        if w * e >= 256  # 4 columns of 2048
    ]
    walked = [
        {"HELD_COLUMNS": 2**20, "WALKED": dict(warps=w, elements=e, resident=most, stages=s), "WALKED_COLUMNS": columns}
        for columns, w, e, most, s in itertools.product((8, 16, 32, 64), (8, 16, 32), (8, 16, 32), (16, 32, 64), (1, 3))
        if w <= most
    ]
    shards = make_masters(DENSE, 1)
    for name, unit_dim, choices in (("rows", 1, rows), ("columns held", 0, held), ("columns walked", 0, walked)):
        some = [shard for shard in shards if shard.unit_dim == unit_dim]
        moved = 8 * sum(shard.values.numel() for shard in some)
        found = []
        for choice in choices:
            with_choice = set_tilings(choice)
            try:
                plan = make_plan(some)
                found.append((moved / median_ms(lambda plan=plan: plan(None), repeats=3, warm_up=1) / 1e-3 / copy, choice))
            except OutOfResources:
                continue
            finally:
                set_tilings(with_choice)
        found.sort(key=lambda one: -one[0])
        for share, choice in found[:8]:
            print(f"{name} {100 * share:5.1f} % of copy: {choice}", flush=True)


def set_tilings(choice: dict) -> dict:
    """Set the module's tilings, or some of their fields; the former ones, in the same form."""
    before = {name: getattr(kernels, name) for name in choice}
    for name, value in choice.items():
        setattr(kernels, name, dataclasses.replace(before[name], **value) if isinstance(value, dict) else value)
    return before


if __name__ == "__main__":
    main()
