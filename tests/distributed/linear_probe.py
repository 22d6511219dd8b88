"""The emulated linear, its diagnostics and `l2_normalize` cut over two ranks: `torchrun --nproc-per-node 2 linear_probe.py OUT.json`.
Needs no Megatron.

Each rank computes the whole layer alone and its part together with the other rank, from the same tensors. With static scales and
nearest-even rounding both quantise the same blocks to the same codes.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext.precision.linear import LinearCall, emulated_linear
from megatron_ext.precision.state import PrecisionState
from ngpt.config import compose
from ngpt.config.recipes import recipe_of
from ngpt.functional import l2_normalize

S, B, K, N = 32, 4, 64, 96
RECIPE = ["experiment=ngpt_tiny", "precision=nvfp4_static", "precision.stochastic_rounding=false"]


def main(out: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.group.WORLD
    recipe = recipe_of(compose(RECIPE).precision)
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(S, B, K, generator=generator), dim=-1)
    w = torch.nn.functional.normalize(torch.randn(N, K, generator=generator), dim=-1)
    dy = torch.randn(S, B, N, generator=generator) * 0.01
    half = {size: slice(rank * size // 2, (rank + 1) * size // 2) for size in (S, K, N)}

    def run(x, w, dy, **options):
        x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
        y = emulated_linear(x, w, LinearCall(recipe=recipe, rounding_seed=lambda: 0, **options))
        y.backward(dy)
        return y.detach(), x.grad, w.grad

    y, dx, dw = run(x, w, dy)
    results = {}

    def compare(name, got, wanted):
        results[name] = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True))

    column = run(x, w[half[N]], dy[..., half[N]], reduce_group=world)
    compare("column", column, (y[..., half[N]], dx, dw[half[N]]))
    sequence = run(x[half[S]], w[half[N]], dy[..., half[N]], gather_group=world)
    compare("column with sequence parallelism", sequence, (y[..., half[N]], dx[half[S]], dw[half[N]]))
    row = run(x[..., half[K]], w[:, half[K]], dy)
    total = row[0].clone()
    dist.all_reduce(total)
    compare("row", (total, *row[1:]), (y, dx[..., half[K]], dw[:, half[K]]))
    results["l2_normalize"] = normalize_deviation(rank)
    dy[..., : N // 4], x[..., : K // 4] = 0, 0  # all of it on rank 0: its shard of a gradient is half zeros, that of rank 1 has none
    results["zeros of column"] = zero_fraction(rank, recipe, x.abs() + 0.1, w[half[N]], dy[..., half[N]], reduce_group=world)
    results["zeros of row"] = zero_fraction(rank, recipe, x[..., half[K]], w[:, half[K]], dy.abs() + 0.1)
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


def zero_fraction(rank: int, recipe, x, w, dy, **options) -> float:
    """What the diagnostics of both ranks say of the zeros in this layer's weight gradient."""
    state = PrecisionState(seed=1, rank=rank, steps=4)
    state.begin_step(1, watched=True)
    call = LinearCall(recipe=recipe, rounding_seed=lambda: 0, watch=state.watch("layer", recipe), **options)
    emulated_linear(x, w.clone().requires_grad_(), call).backward(dy)
    return state.figures()["precision/layer/wgrad/zero_fraction"]


def normalize_deviation(rank: int) -> float:
    """| got - wanted | / (1 + | wanted |) of features and gradient against fp64. Widths differ; a row is zero on one rank, one on both."""
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(5, 3, 11, generator=generator) for _ in range(2))
    x[0, 0, :4], x[1, 1] = 0, 0
    mine = slice(0, 4) if rank == 0 else slice(4, 11)
    whole, part = x.double().requires_grad_(), x[..., mine].clone().requires_grad_()
    truth = whole * torch.rsqrt(whole.square().sum(-1, keepdim=True) + 1e-12)
    truth.backward(grad.double())
    y = l2_normalize(part, group=dist.group.WORLD)
    y.backward(grad[..., mine])
    pairs = (y.detach(), truth.detach()[..., mine]), (part.grad, whole.grad[..., mine])
    worst = torch.stack([((a - b).abs() / (1 + b.abs())).max() for a, b in pairs]).max()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


if __name__ == "__main__":
    main(sys.argv[1])
