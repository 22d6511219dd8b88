"""Models in fp8 on one GPU with their experts one by one and together: what differs between the two.

Run as `torchrun native_experts_probe.py OUT.json`; the tests read the file. A process of its own, because Megatron and the compatibility
modules change global state.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "numerics"))

COMMON = [
    "experiment=ngpt_hybrid_tiny", "precision=fp8", "model.layer_pattern='*E*E'", "model.num_layers=4", "model.hidden_size=256",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.head_dim=64", "model.moe_ffn_hidden_size=128",
    "model.moe_shared_ffn_hidden_size=128", "train.seq_length=128",
]  # fmt: skip
SPECS = {
    "plain": [],
    "gated": ["model.activation=swiglu", "model.moe_suv=shared"],
    "recomputed": ["parallel.recompute=full"],
    "control": ["model.architecture=gpt"],
}


def main(out: str) -> None:
    from launch.worker import install_compat

    install_compat()
    import torch

    results = {}
    for name, overrides in SPECS.items():
        sequential, grouped = (run(f"{name}_{impl}", impl, overrides, Path(out).parent) for impl in ("sequential", "auto"))
        results[name] = {
            "executors": [sequential["executors"], grouped["executors"]],
            "empty": grouped["empty"],
            "differences": {
                key: difference(grouped["found"][key], like_grouped(key, sequential["found"])) for key in grouped["found"]
            },
            "checkpoints": [sequential["checkpoint"], grouped["checkpoint"]],
        }
    Path(out).write_text(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()


def run(name: str, impl: str, overrides: list[str], root: Path) -> dict:
    """Loss and gradients of a model whose weights depend on their names alone, how experts ran, and the checkpoint's entries."""
    import torch
    from megatron.training.training import destroy_global_state
    from model_probe import checkpoint_entries

    from megatron_ext.device import on_gpu
    from megatron_ext.precision.executors import Quantizable, QuantizableGrouped
    from megatron_ext.precision.policy import apply_recipes, choose_executors, linears_of
    from megatron_ext.precision.state import PrecisionState
    from megatron_ext.training.sample import load_model
    from ngpt.config import compose
    from ngpt.config.executor import choose_backend

    cfg = compose([*COMMON, f"model.expert_impl={impl}", *overrides, f"run.root={root}", f"run.name={name}"])
    model = load_model(cfg).train()
    own = {path.removeprefix("module."): param for path, param in model.named_parameters()}
    for path, param in own.items():
        if param.dim() == 2:
            param.data.copy_(named_weights(path, param, cfg.model.num_experts))
        param.main_grad, param.grad_added_to_main_grad = torch.zeros_like(param, dtype=torch.float32), False
    for path, bias in model.named_buffers():
        if path.endswith("expert_bias"):
            bias[-1] = -10.0  # its expert gets no token
    executors = choose_executors(cfg, choose_backend(cfg.model.transformer_impl, on_gpu()))
    state = PrecisionState(cfg.train.seed, 0, cfg.train.steps, keeps_weights=True)
    apply_recipes([model], cfg, executors, state)
    state.begin_step(1)
    empty = []
    for linear in [linear for _, linear in linears_of([model]) if isinstance(linear, QuantizableGrouped)]:
        linear.register_forward_pre_hook(lambda _, args: empty.append(args[1].count(0)))
    generator = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(0, cfg.model.vocab_size, (2, 2, cfg.train.seq_length), generator=generator).cuda()
    positions = torch.arange(cfg.train.seq_length, device="cuda").expand_as(tokens)
    with torch.enable_grad(), state.weights.training_step():
        losses = model(tokens, positions, None, labels=labels)
        losses.mean().backward()
    found = {"loss": losses.detach().float()}
    for path, param in own.items():
        grad = param.main_grad if param.grad_added_to_main_grad or param.grad is None else param.main_grad + param.grad
        found[path] = grad.float()
    kinds = {type(module.executor).__name__ for module in model.modules() if isinstance(module, Quantizable) and module.is_executed}
    checkpoint = sorted(map(str, checkpoint_entries(model)))
    destroy_global_state()
    return {"found": found, "executors": sorted(kinds), "empty": sum(empty), "checkpoint": checkpoint}


def named_weights(path: str, param, experts: int):
    """Rows (or columns) of about unit norm, the same for an expert whether it has a parameter of its own or a part of one."""
    import torch

    own = path.replace("local_experts.", "").split(".")
    if ".experts." in path and "local_experts" not in path:
        index = own.index("experts") + 1
        names = [".".join([*own[:index], str(expert), *own[index:]]) for expert in range(experts)]
    else:
        names = [".".join(own)]
    matrices = []
    for name in names:
        generator = torch.Generator().manual_seed(sum(ord(letter) * (place + 1) for place, letter in enumerate(name)))
        matrices.append(torch.randn(param.size(0) // len(names), param.size(1), generator=generator) * param.size(1) ** -0.5)
    return torch.cat(matrices)


def like_grouped(path: str, found: dict):
    """The gradient `path` of a model with experts together, from one whose experts run one by one."""
    import re

    import torch

    if path in found:
        return found[path]
    prefix, name = re.fullmatch(r"(.*\.experts)\.(linear_fc\d\..*)", path).groups()
    parts = [key for key in found if re.fullmatch(rf"{re.escape(prefix)}\.local_experts\.\d+\.{re.escape(name)}", key)]
    return torch.cat([found[f"{prefix}.local_experts.{expert}.{name}"] for expert in range(len(parts))])


def difference(ours, wanted) -> float:
    assert ours.shape == wanted.shape
    return ((ours - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


if __name__ == "__main__":
    main(sys.argv[1])
