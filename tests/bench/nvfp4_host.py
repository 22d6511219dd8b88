"""Host time of one emulated NVFP4 linear, forward and backward, beside its GPU time and beside the same linear in BF16.

    PYTHONPATH=CODE python tests/bench/nvfp4_host.py --out FOLDER [--tokens 256] [--shape 2048x2048]

CODE may be the tree of an older commit. With so few tokens the GPU waits for the host. Host times are medians of a call with an idle
device, with weights quantised in every pass and, where the code can keep them, once a step; GPU times are medians over replays of a CUDA
graph. Gradients are returned, not accumulated in parameters.

Prediction, written before measuring (H200; a CPU without launches: 3.4 times less with kept weights, autograd included): nvfp4_paper
0.10 ms forward and 0.15 ms backward with kept weights, before 0.22 and 0.30.
"""

import argparse
import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from bench_tools import Bf16Linear, copy_bandwidth, median_seconds_in_graph, write_results
from torch import Tensor

from megatron_ext.precision.linear import LinearCall, emulated_linear
from ngpt.config import compose
from ngpt.config.recipes import recipe_of

RECIPES = ("nvfp4_paper", "nvfp4_static", "nvfp4_nvidia")
CALLS, REPLAYS, HOST_CALLS, WARM_UP = 10, 7, 300, 50
Linear = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--shape", default="2048x2048", help="input x output features")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    k, n = map(int, options.shape.split("x"))
    print(f"{options.tokens} tokens, {k}x{n}: ms of the host forward, backward; of the GPU forward, backward")
    rows = []
    for name, linear, step in linears():
        with step:
            rows.append({"case": name, "tokens": options.tokens, "shape": options.shape} | measure(linear, options.tokens, k, n))
        times = [rows[-1][f"{where}_{which}_ms"] for where in ("host", "gpu") for which in ("forward", "backward")]
        print(f"{name:28s}" + "".join(f"{ms:9.3f}" for ms in times), flush=True)
    write_results(options.out, "nvfp4_host", copy_bandwidth() * 1e9, rows)


def linears() -> list[tuple[str, Linear, AbstractContextManager]]:
    """(name, linear, what it is measured within)."""
    found: list[tuple[str, Linear, AbstractContextManager]] = [("bf16", Bf16Linear.apply, contextlib.nullcontext())]
    for name in RECIPES:
        recipe = recipe_of(compose(["experiment=ngpt_tiny", f"precision={name}"]).precision)
        found.append((name, emulated(recipe=recipe), contextlib.nullcontext()))
        if importlib.util.find_spec("megatron_ext.precision.weights"):  # not in older code
            from megatron_ext.precision.weights import StepWeights

            weights = StepWeights(keeps=True)
            found.append((f"{name}, weights kept", emulated(recipe=recipe, weights=weights), weights.training_step()))
    return found


def emulated(**options: object) -> Linear:
    """As an executor calls it: what describes the call is made anew each time."""
    return lambda x, w: emulated_linear(x, w, LinearCall(rounding_seed=lambda: 12345, **options))


def measure(linear: Linear, tokens: int, k: int, n: int) -> dict[str, float]:
    """Median milliseconds of both passes, of the host and of the GPU."""
    x = torch.nn.functional.normalize(torch.randn(tokens, k, device="cuda"), dim=-1).bfloat16().requires_grad_()
    w = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(n, k, device="cuda"), dim=-1).bfloat16())
    w.main_grad, w.grad_added_to_main_grad = torch.zeros(n, k, device="cuda"), False
    dy = (torch.randn(tokens, n, device="cuda") * 1e-4).bfloat16()

    def both(i: int = 0) -> tuple[Tensor, ...]:
        return torch.autograd.grad(linear(x, w), (x, w), dy)

    host: tuple[list[float], list[float]] = ([], [])
    for _ in range(WARM_UP + HOST_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        y = linear(x, w)
        between = time.perf_counter()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.autograd.grad(y, (x, w), dy)
        end = time.perf_counter()
        host[0].append(between - start)
        host[1].append(end - begin)
    forward, backward = (1e3 * statistics.median(times[WARM_UP:]) for times in host)
    gpu_forward = 1e3 * median_seconds_in_graph(lambda i: linear(x, w), CALLS, REPLAYS)
    gpu_both = 1e3 * median_seconds_in_graph(both, CALLS, REPLAYS)
    return {
        "host_forward_ms": forward,
        "host_backward_ms": backward,
        "gpu_forward_ms": gpu_forward,
        "gpu_backward_ms": gpu_both - gpu_forward,
    }


if __name__ == "__main__":
    main()
