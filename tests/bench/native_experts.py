"""Host and GPU time of the linear of all experts of a rank in fp8: a module of Transformer Engine for each, all together, in BF16.

    PYTHONPATH=. python tests/bench/native_experts.py --out FOLDER [--experts 64] [--shape 1024x1856] [--precision fp8]

Refuses to measure where tests/gpu/test_native_experts.py is red; its models, which take minutes, are left out. Host times are medians of a
call with an idle device and 32 tokens an expert, elapsed times by device events with 1536 tokens an expert, which include what the GPU
waits for the host. Weights are quantised in every pass, or where it says so once a step. Gradients are added to `main_grad`.

Prediction, written before measuring (H200, 64 experts of 1024 x 1856; ms of the host, forward and backward): one by one 15 and 15; together
3.5 and 3.2, with kept weights 2.2 and 3.2, which is 85 us of an expert's linear both ways: per expert 15 us a product (measured in BF16)
and 20 us an operand. BF16 grouped 0.1 and 0.2. Elapsed, forward and backward: together 4 and 5 ms, which the host decides; one by one 15
and 15. Measured: tests/bench/README.md, Native experts.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import torch
from bench_tools import copy_bandwidth, median_ms, write_results
from torch import Tensor

from megatron_ext.precision.executors import NativeGroupedExecutor
from megatron_ext.precision.grouped import grouped_linear
from megatron_ext.precision.state import PrecisionState
from megatron_ext.precision.te_recipes import autocast, te_recipe, unavailable
from ngpt.config import compose
from ngpt.config.recipes import recipe_of

TESTS = Path(__file__).parents[1] / "gpu" / "test_native_experts.py"
FEW, MANY = 32, 1536  # tokens of an expert
CALLS, WARM_UP = 60, 10
Linear = Callable[[Tensor, list[int]], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--shape", default="1024x1856", help="input x output features")
    parser.add_argument("--precision", default="fp8", help="of conf/precision")
    options = parser.parse_args()
    recipe = recipe_of(compose(["experiment=ngpt_hybrid_tiny", "model.moe_ffn_hidden_size=64", f"precision={options.precision}"]).precision)
    if reason := unavailable(recipe):
        sys.exit(reason)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS), "-k", "not model and not checkpoints"]
    if subprocess.run(tests).returncode:
        sys.exit("Experts together are wrong here: nothing is measured.")
    k, n = map(int, options.shape.split("x"))
    print(f"{options.experts} experts of {k} x {n}: ms of the host forward, backward; elapsed forward, backward")
    rows = []
    for name, linear, step in linears(te_recipe(recipe), options.experts, k, n):
        with step:
            rows.append({"case": name, "experts": options.experts, "shape": options.shape} | measure(linear, options.experts, k, n))
        times = [rows[-1][f"{where}_{which}_ms"] for where in ("host", "elapsed") for which in ("forward", "backward")]
        print(f"{name:32s}" + "".join(f"{ms:9.3f}" for ms in times), flush=True)
    write_results(options.out, "native_experts", copy_bandwidth() * 1e9, rows)


def linears(recipe: object, experts: int, k: int, n: int) -> list[tuple[str, Linear, AbstractContextManager]]:
    """(name, linear, what it is measured within)."""
    weight = torch.nn.Parameter(torch.randn(experts * n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape, device="cuda"), False
    found: list[tuple[str, Linear, AbstractContextManager]] = [
        ("one by one", one_by_one(recipe, experts, k, n), contextlib.nullcontext()),
        ("BF16 grouped", lambda x, sizes: grouped_linear(x, weight, sizes), contextlib.nullcontext()),
    ]
    for keeps in (False, True):
        state = PrecisionState(1, 0, 4, keeps_weights=keeps)
        executor, module = NativeGroupedExecutor(state, recipe), SimpleNamespace(weight=weight)
        name = f"together{', weights kept' if keeps else ''}"
        found.append((name, lambda x, sizes, run=executor, module=module: run(module, x, sizes)[0], state.weights.training_step()))
    return found


def one_by_one(recipe: object, experts: int, k: int, n: int) -> Linear:
    import transformer_engine.pytorch as te

    options = dict(bias=False, params_dtype=torch.bfloat16, fuse_wgrad_accumulation=True, device="cuda")
    modules = [te.Linear(k, n, **options) for _ in range(experts)]
    for module in modules:
        module.weight.main_grad, module.weight.grad_added_to_main_grad = torch.zeros(n, k, device="cuda"), False

    def run(x: Tensor, sizes: list[int]) -> Tensor:
        outputs = []
        for module, tokens in zip(modules, x.split(sizes), strict=True):
            with autocast(recipe):
                outputs.append(module(tokens))
        return torch.cat(outputs)

    return run


def measure(linear: Linear, experts: int, k: int, n: int) -> dict[str, float]:
    """Median milliseconds of both passes."""
    figures: dict[str, float] = {}
    x, dy, sizes = make_inputs(FEW, experts, k, n)
    host: tuple[list[float], list[float]] = ([], [])
    for _ in range(WARM_UP + CALLS):
        x.grad = None
        torch.cuda.synchronize()
        start = time.perf_counter()
        y = linear(x, sizes)
        between = time.perf_counter()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        y.backward(dy)
        host[0].append(between - start)
        host[1].append(time.perf_counter() - begin)
    figures["host_forward_ms"], figures["host_backward_ms"] = (1e3 * statistics.median(times[WARM_UP:]) for times in host)
    x, dy, sizes = make_inputs(MANY, experts, k, n)
    figures["elapsed_forward_ms"] = median_ms(lambda: linear(x, sizes))
    both = median_ms(lambda: linear(x, sizes).backward(dy))
    return figures | {"elapsed_backward_ms": both - figures["elapsed_forward_ms"]}


def make_inputs(tokens: int, experts: int, k: int, n: int) -> tuple[Tensor, Tensor, list[int]]:
    x = torch.nn.functional.normalize(torch.randn(tokens * experts, k, device="cuda"), dim=-1).bfloat16().requires_grad_()
    return x, (torch.randn(tokens * experts, n, device="cuda") * 1e-4).bfloat16(), [tokens] * experts


if __name__ == "__main__":
    main()
