"""Trains a model in BF16, and looks at it under a recipe with constant scales: `torchrun static_probe.py OUT.json`.

It keeps the operands of both, and the figures that the second run wrote itself.
"""

import json
import sys
from pathlib import Path

TINY = [
    "experiment=ngpt_hybrid_tiny", "model.layer_pattern='*-ME'", "model.num_layers=4", "train.eval_steps=0", "train.global_batch_size=2",
    "train.micro_batch_size=2", "logging.interval=1", "logging.health_interval=1",
]  # fmt: skip
TRAINED = ["precision=bf16", "train.steps=2", "checkpoint.save_at_end=true"]
STATIC = ["precision=nvfp4_static", "precision.diagnostics=true", "train.steps=1", "checkpoint.save_at_end=false"]


def main(out: str) -> None:
    from launch.worker import install_compat

    install_compat()
    import torch
    from megatron.training.training import destroy_global_state

    from megatron_ext.precision.executors import EmulatedExecutor, GroupedExecutor
    from megatron_ext.training.run import train
    from ngpt.config import compose

    root, trained, looked_at = Path(out).parent, {}, {}
    train(compose([*TINY, *TRAINED, f"run.root={root}", "run.name=trained"]), 0, [lambda chunks: watch_products(chunks, trained)])
    destroy_global_state()

    def watch(kind: type) -> None:
        run = kind.__call__

        def watched(executor, linear, x, *sizes):
            keep(looked_at, executor.name, of_one_expert(x, *sizes), executor.recipe.input.rowwise)
            return run(executor, linear, x, *sizes)

        kind.__call__ = watched

    watch(EmulatedExecutor)
    watch(GroupedExecutor)
    train(compose([*TINY, *STATIC, f"checkpoint.load={root}/trained/checkpoints", f"run.root={root}", "run.name=looked_at"]), 0)
    row = json.loads((root / "looked_at" / "metrics.jsonl").read_text())
    Path(out).write_text(json.dumps({"trained": trained, "looked_at": looked_at, "figures": row}))
    torch.distributed.destroy_process_group()


def watch_products(chunks: list, found: dict) -> None:
    """Keep the inputs that a model's matrices multiply in high precision."""
    from megatron_ext.layers import grouped
    from megatron_ext.precision.policy import linears_of

    of_all_experts, stacked = grouped.grouped_linear, {}

    def watched_experts(x, weight, sizes):
        keep(found, stacked[weight], of_one_expert(x, sizes))
        return of_all_experts(x, weight, sizes)

    grouped.grouped_linear = watched_experts

    def watch(name: str, linear) -> None:
        product = linear._forward_impl

        def watched(input, weight, *args, **kwargs):
            keep(found, name, input)
            return product(input, weight, *args, **kwargs)

        linear._forward_impl = watched

    for name, linear in linears_of(chunks):
        if isinstance(linear, grouped.QuantizableGrouped):
            stacked[linear.weight] = name
        else:
            watch(name, linear)


def of_one_expert(x, sizes=None):
    """The tokens of the first expert that has any, which the diagnostics look at; all where a linear has one matrix."""
    return x if sizes is None else x[: next((size for size in sizes if size), 0)]


def keep(found: dict, name: str, x, spec=None) -> None:
    """For a linear's first operand: the largest | norm - 1 | of its tokens, its largest element, and the error of unit vectors in NVFP4.

    Experts get rows of zeros that fill up their tokens.
    """
    import torch

    from ngpt.precision import quantize

    if name in found or not x.numel():
        return
    x = x.detach().flatten(0, -2).double()
    norms = x.norm(dim=-1)
    found[name] = {"deviation": (norms[norms > 0] - 1).abs().max().item(), "amax": x.abs().max().item()}
    if spec is not None:
        unit = torch.nn.functional.normalize(x, dim=-1)
        error = quantize(unit.float(), spec).dequantize().double() - unit
        found[name]["relative_error"] = (error.norm() / unit.norm()).item()


if __name__ == "__main__":
    main(sys.argv[1])
