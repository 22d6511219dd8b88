"""What the benchmarks share: time by device events, the copy bandwidth of this card, versions."""

import json
import platform
import statistics
import sys
from collections import deque
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch


def median_ms(work, repeats: int = 20, warm_up: int = 5) -> float:
    """Median time of a call in milliseconds, by device events."""
    for _ in range(warm_up):
        work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def median_seconds_in_graph(call: Callable[[int], object], calls: int, replays: int, kept: int = 0) -> float:
    """Median time of a call, which gets its number, within replays of a CUDA graph of so many: without launch overhead.

    Args:
        kept: results alive at once; more of them rotate the memory that outputs go to.
    """
    for i in range(max(3, kept)):
        call(i)
    torch.cuda.synchronize()
    graph, results = torch.cuda.CUDAGraph(), deque(maxlen=kept)
    with torch.cuda.graph(graph):
        for i in range(calls):
            results.append(call(i))
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times[1:])


def copy_bandwidth(size: int = 2**30) -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    source, target = torch.empty(size, dtype=torch.uint8, device="cuda"), torch.empty(size, dtype=torch.uint8, device="cuda")
    source.random_()
    return 2 * size / median_ms(lambda: target.copy_(source)) / 1e6


def environment() -> dict[str, str]:
    """Card and versions."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def write_results(out: Path, operation: str, copy_bytes_per_s: float, results: list[dict]) -> None:
    """What was measured, the command, card and versions, in OUT, or where it is not called .json in OUT/<operation>_<date>.json."""
    today = date.today().isoformat()
    everything = {
        "operation": operation,
        "command": " ".join(sys.argv),
        "date": today,
        "environment": environment(),
        "copy_bytes_per_s": copy_bytes_per_s,
        "results": results,
    }
    file = out if out.suffix == ".json" else out / f"{operation}_{today}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(everything, indent=1) + "\n")


class Bf16Linear(torch.autograd.Function):
    """A linear layer in BF16 that adds its weight gradient to `main_grad`: the fastest that we can write with torch."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        ctx.main_grad = w.main_grad
        return x @ w.t()

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dx = dy @ w
        torch.addmm(ctx.main_grad, dy.t(), x, out_dtype=torch.float32, out=ctx.main_grad)
        return dx, torch.empty_like(w)
