"""Emulated NVFP4 linear, forward and backward, beside the same layer in BF16 and beside Transformer Engine's Python reference.

    python tests/bench/nvfp4_linear.py --out FOLDER [--tokens 16384] [--shapes 2048x6144,4096x14336] [--no-reference]

Prediction, written before measuring (bytes over 2.96 TB/s, FLOPs over 650 TFLOP/s; see ngpt/kernels/nvfp4_quantize/README.md): with
the paper's recipe a pass reads and writes 6 B an element of x (one read, two writes), 8 B of grad_output (amax, read, two writes) and
2 * 4 B of the weight (quantised again in the backward pass): 2048x6144 takes 1.9 + 0.38 ms = 1.20x, 4096x14336 8.9 + 0.93 ms = 1.10x.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from bench_tools import Bf16Linear, copy_bandwidth, environment, median_ms

from megatron_ext.precision.linear import LinearCall, emulated_linear
from ngpt.config import compose
from ngpt.config.recipes import recipe_of

RECIPES = ("nvfp4_paper", "nvfp4_static", "nvfp4_nvidia")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--shapes", default="2048x6144,4096x14336")
    parser.add_argument("--no-reference", action="store_true")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    result = {"environment": environment(), "copy_gb_per_s": copy_bandwidth(), "tokens": options.tokens, "rows": []}
    print(f"copy {result['copy_gb_per_s']:.0f} GB/s, {options.tokens} tokens, forward + backward, fp32 main_grad accumulation")
    for shape in options.shapes.split(","):
        result["rows"] += compare(options.tokens, *map(int, shape.split("x")))
    if not options.no_reference:
        result["reference"] = against_the_python_reference(8192, 2048, 6144)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"nvfp4_linear_{time.strftime('%Y-%m-%d')}.json"
    file.write_text(json.dumps(result, indent=1))


def layer(tokens: int, k: int, n: int) -> tuple[torch.Tensor, torch.nn.Parameter, torch.Tensor]:
    """Unit-norm tokens and rows as in nGPT, a small output gradient, and Megatron's gradient buffer."""
    x = torch.nn.functional.normalize(torch.randn(tokens, k, device="cuda"), dim=-1).bfloat16().requires_grad_()
    w = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(n, k, device="cuda"), dim=-1).bfloat16())
    w.main_grad, w.grad_added_to_main_grad = torch.zeros(n, k, device="cuda"), False
    return x, w, (torch.randn(tokens, n, device="cuda") * 1e-4).bfloat16()


def compare(tokens: int, k: int, n: int) -> list[dict]:
    rows = []
    x, w, dy = layer(tokens, k, n)

    def both_passes(forward):
        x.grad = w.grad = None
        forward(x, w).backward(dy)

    baselines = {"cuBLAS, main_grad accumulated": Bf16Linear.apply, "torch linear, gradient returned": torch.nn.functional.linear}
    bf16 = {name: median_ms(lambda forward=forward: both_passes(forward)) for name, forward in baselines.items()}
    best = min(bf16.values())
    for name, ms in bf16.items():
        rows.append({"shape": f"{k}x{n}", "what": f"bf16 {name}", "ms": ms, "over_bf16": ms / best})
    for name in RECIPES:
        recipe = recipe_of(compose(["experiment=ngpt_tiny", f"precision={name}"]).precision)
        call = LinearCall(recipe=recipe, rounding_seed=lambda: 12345)
        ms = median_ms(lambda call=call: both_passes(lambda x, w: emulated_linear(x, w, call)))
        rows.append({"shape": f"{k}x{n}", "what": name, "ms": ms, "over_bf16": ms / best})
    for row in rows:
        print(f"{row['shape']:>12} {row['what']:36} {row['ms']:8.3f} ms {row['over_bf16']:6.3f}x")
    return rows


def against_the_python_reference(tokens: int, k: int, n: int) -> dict:
    """Ours beside Transformer Engine's pure-PyTorch NVFP4 reference in its own linear."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import CustomRecipe
    from transformer_engine.pytorch.custom_recipes.reference_nvfp4 import nvfp4_ref_rht_2d_factory

    x, w, dy = layer(tokens, k, n)
    linear = te.Linear(k, n, bias=False, params_dtype=torch.bfloat16, device="cuda")

    def reference():
        x.grad = linear.weight.grad = None
        with te.autocast(enabled=True, recipe=CustomRecipe(qfactory=nvfp4_ref_rht_2d_factory)):
            y = linear(x)
        y.backward(dy)

    times = {}
    reference()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(3):
        reference()
    torch.cuda.synchronize()
    times["transformer_engine_reference_ms"] = (time.perf_counter() - began) / 3 * 1e3
    for name in RECIPES:
        call = LinearCall(recipe=recipe_of(compose(["experiment=ngpt_tiny", f"precision={name}"]).precision), rounding_seed=lambda: 1)

        def ours(call=call):
            x.grad = w.grad = None
            emulated_linear(x, w, call).backward(dy)

        times[f"{name}_ms"] = median_ms(ours)
        times[f"{name}_faster"] = times["transformer_engine_reference_ms"] / times[f"{name}_ms"]
    print(f"{tokens}x{k}x{n}: " + ", ".join(f"{key} {value:.2f}" for key, value in times.items()))
    return times


if __name__ == "__main__":
    main()
