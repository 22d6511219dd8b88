"""Hybrid models in low precision with their experts one by one and in grouped linears: what differs between the two.

Run as `torchrun grouped_probe.py OUT.json`; the tests read the file. A process of its own, as model_probe.py.
"""

import json
import sys
from pathlib import Path

from ngpt.config.linears import recipes_in_use

NEAREST = "precision.stochastic_rounding=false"
SPECS = {
    "paper": ["precision=nvfp4_paper", "precision.dtype=fp32", NEAREST],
    "paper_bf16_gated": ["precision=nvfp4_paper", NEAREST, "model.activation=swiglu"],
    "paper_shared_suv": ["precision=nvfp4_paper", NEAREST, "model.activation=swiglu", "model.moe_suv=shared"],
    "static": ["precision=nvfp4_static", "precision.dtype=fp32", NEAREST, "precision.static_grad_amax=5.25"],
}


def main(out: str) -> None:
    from launch.worker import install_compat

    install_compat()
    import torch
    from model_probe import deviation
    from repeats import keep_what_repeats

    keep_what_repeats()
    results = {}
    for name, overrides in SPECS.items():
        sequential, params, first = run(name, overrides, Path(out).parent)
        grouped, _, second = run(name, overrides, Path(out).parent, params)
        results[name] = {
            "executors": [first["executors"], second["executors"]],
            "sizes": second["sizes"],
            "names": [sorted(sequential), sorted(grouped)],
            "changed": {key: deviation(grouped[key], value) for key, value in sequential.items() if not torch.equal(value, grouped[key])},
            "all_zero": [key for key, value in sequential.items() if not value.any()],
        }
    Path(out).write_text(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()


def run(name: str, overrides: list[str], root: Path, params: dict | None = None) -> tuple[dict, dict, dict]:
    """Loss and gradients under the reference's names, the parameters that were used, and how experts were run.

    Args:
        params: of the model with experts one by one. Where given, experts are grouped and get these.
    """
    import torch
    from megatron.training.training import destroy_global_state
    from model_probe import randomize, to_reference
    from trainer_model import load_model

    from megatron_ext.precision.executors import QuantizableGrouped
    from megatron_ext.precision.policy import apply_recipes, linears_of
    from megatron_ext.precision.state import PrecisionState
    from ngpt.config import compose

    impl = f"model.expert_impl={'grouped' if params else 'sequential'}"
    cfg = compose(["experiment=ngpt_hybrid_tiny", impl, *overrides, f"run.root={root}", f"run.name={name}"])
    model = load_model(cfg).train()
    randomize(model, cfg)
    own = {path.removeprefix("module."): param for path, param in model.named_parameters()}
    for path, param in own.items() if params else ():
        param.data.copy_(like_grouped(path, params, cfg.model.num_experts))
    for path, bias in model.named_buffers():
        if path.endswith("expert_bias"):
            bias[-1] = -10.0  # its expert gets no token
    state = PrecisionState(cfg.train.seed, 0, cfg.train.steps)
    apply_recipes([model], cfg, dict.fromkeys(recipes_in_use(cfg), "emulated"), state)
    state.begin_step(1)

    kinds, sizes = {f"{path} {type(linear.executor).__name__}" for path, linear in linears_of([model])}, []
    for linear in [linear for _, linear in linears_of([model]) if isinstance(linear, QuantizableGrouped)]:
        linear.register_forward_pre_hook(lambda _, args: sizes.append(args[1]))
    generator = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(0, cfg.model.vocab_size, (2, 2, 32), generator=generator)
    with torch.enable_grad():
        losses = model(tokens, torch.arange(32).expand_as(tokens), None, labels=labels)
        losses.sum().backward()
    buffers = {path.removeprefix("module."): buffer for path, buffer in model.named_buffers()}
    found = to_reference({path: param.grad for path, param in own.items()} | buffers, cfg) | {"loss": losses.detach()}
    destroy_global_state()
    return found, {path: param.detach() for path, param in own.items()}, {"executors": sorted(kinds), "sizes": sizes}


def like_grouped(path: str, params: dict, experts: int):
    """The parameter `path` of a model with grouped experts, from one whose experts run one by one."""
    import re

    import torch

    if path in params:
        return params[path]
    prefix, name = re.fullmatch(r"(.*\.experts)\.(linear_fc\d\..*)", path).groups()
    return torch.cat([params[f"{prefix}.local_experts.{expert}.{name}"] for expert in range(experts)])


if __name__ == "__main__":
    main(sys.argv[1])
