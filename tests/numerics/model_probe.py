"""Builds models through the product's own path on one process and measures them against the fp64 reference.

Run as `torchrun model_probe.py OUT.json`; the tests read the deviations from the file. A process of its own, because Megatron and the
CPU compatibility module change global state.
"""

import json
import sys
from pathlib import Path

COMMON = ["experiment=ngpt_tiny", "model.num_layers=2", "model.hidden_size=48", "model.num_attention_heads=6", "model.head_dim=16"]
SPECS = {
    "plain": ["model.num_query_groups=2", "model.ffn_hidden_size=96"],
    "gated_tied": ["model.activation=swiglu", "model.tied_embeddings=true", "model.num_query_groups=3"],
    "not_fine_grained": ["model.fine_grained=false"],
    "no_positions": ["model.position_embedding=none", "model.rope_base=500000"],
    "control": ["model.architecture=gpt", "model.num_query_groups=2"],
    "control_gated_tied": ["model.architecture=gpt", "model.activation=swiglu", "model.tied_embeddings=true"],
}


def main(out: str) -> None:
    from launch.worker import install_compat

    install_compat()
    import torch
    from megatron.training.training import destroy_global_state

    from megatron_ext.training.sample import load_model
    from ngpt.config import compose
    from ngpt.estimate.counts import count_parameters

    results = {}
    for name, overrides in SPECS.items():
        cfg = compose([*COMMON, *overrides, f"run.root={Path(out).parent}", f"run.name={name}"])
        model = load_model(cfg)
        randomize(model, cfg)
        with torch.enable_grad():
            results[name] = compare(model, cfg)
        results[name]["parameters"] = sum(param.numel() for param in model.parameters())
        results[name]["counted"] = count_parameters(cfg.model).total
        destroy_global_state()
    Path(out).write_text(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()


def randomize(model, cfg) -> None:
    """Give every scale and norm weight its own values, some alphas negative."""
    import torch

    generator = torch.Generator().manual_seed(3)
    for name, param in model.named_parameters():
        if param.dim() == 1:
            param.data.mul_(torch.rand(param.shape, generator=generator) + 0.5)
            if name.endswith("alpha.stored"):
                param.data.mul_(torch.where(torch.rand(param.shape, generator=generator) < 0.25, -1.0, 1.0))


def to_reference(state: dict, cfg) -> dict:
    """Megatron's parameters (or their gradients) under the reference's names; padding rows dropped."""
    model = cfg.model
    heads, groups, dim, vocab = model.num_attention_heads, model.num_query_groups, model.head_dim, model.vocab_size
    found = {"embedding": state["embedding.word_embeddings.weight"][:vocab]}
    if not model.tied_embeddings:
        found["head"] = state["output_layer.weight"][:vocab]
    for i in range(model.num_layers):
        attn, mlp = f"decoder.layers.{2 * i}.", f"decoder.layers.{2 * i + 1}."
        qkv = state[f"{attn}self_attention.linear_qkv.weight"].view(groups, heads // groups + 2, dim, -1)
        to_a, to_m = f"layers.{i}.attn.", f"layers.{i}.mlp."
        found[f"{to_a}q"] = qkv[:, :-2].reshape(heads * dim, -1)
        found[f"{to_a}k"] = qkv[:, -2].reshape(groups * dim, -1)
        found[f"{to_a}v"] = qkv[:, -1].reshape(groups * dim, -1)
        found[f"{to_a}proj"] = state[f"{attn}self_attention.linear_proj.weight"]
        fc1 = state[f"{mlp}mlp.linear_fc1.weight"]
        gated = model.activation == "swiglu"
        found |= dict(zip((f"{to_m}gate", f"{to_m}up"), fc1.chunk(2), strict=True)) if gated else {f"{to_m}fc1": fc1}
        found[f"{to_m}fc2"] = state[f"{mlp}mlp.linear_fc2.weight"]
        if model.architecture == "gpt":
            found |= {f"{to_a}norm": state[f"{attn}input_layernorm.weight"], f"{to_m}norm": state[f"{mlp}pre_mlp_layernorm.weight"]}
            continue
        found |= {f"{to_a}alpha": state[f"{attn}self_attn_bda.alpha.stored"], f"{to_m}alpha": state[f"{mlp}mlp_bda.alpha.stored"]}
        found[f"{to_a}sqk"] = state[f"{attn}self_attention.core_attention.sqk.stored"]
        suv = state[f"{mlp}mlp.linear_fc1.suv.stored"]
        found |= dict(zip((f"{to_m}suv_gate", f"{to_m}suv_up"), suv.chunk(2), strict=True)) if gated else {f"{to_m}suv": suv}
    if model.architecture == "gpt":
        found["final_norm"] = state["decoder.final_norm.weight"]
    else:
        found["sz"] = state["sz.stored"][:vocab]
    return {name: value.detach().double().clone() for name, value in found.items()}


def compare(model, cfg) -> dict:
    """Relative deviations of logits, loss, gradients, projection inputs and outputs; causality and the token-0 test."""
    import torch
    from reference_model import ModelSpec, reference_logits, reference_loss

    m = cfg.model
    spec = ModelSpec(
        m.architecture, m.num_layers, m.hidden_size, m.ffn_hidden_size, m.num_attention_heads, m.num_query_groups, m.head_dim,
        m.vocab_size, m.activation, m.tied_embeddings, m.position_embedding == "rope", m.rope_base, m.fine_grained, m.alpha_init,
        m.norm_epsilon,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, m.vocab_size, (2, 17), generator=generator)
    labels = torch.randint(0, m.vocab_size, (2, 17), generator=generator)
    positions = torch.arange(17).expand_as(tokens)
    seen = watch_projections(model)

    params = to_reference(dict(model.named_parameters()), cfg)
    for value in params.values():
        value.requires_grad_()
    record: dict = {}
    wanted_logits = reference_logits(params, spec, tokens, record)
    wanted_loss = reference_loss(params, spec, tokens, labels)
    wanted_loss.backward()

    logits = model(tokens, positions, None)
    result = {"logits": deviation(logits[..., : m.vocab_size], wanted_logits), "padding_probability": padding_probability(logits, m)}
    result |= {f"seen/{name}": deviation(value.transpose(0, 1), record[name]) for name, value in seen.items()}
    loss = model(tokens, positions, None, labels=labels).mean()
    result["loss"] = deviation(loss, wanted_loss)
    loss.backward()
    gradients = to_reference({name: param.grad for name, param in model.named_parameters()}, cfg)
    result |= {f"grad/{name}": deviation(gradients[name], params[name].grad) for name in params}

    with torch.no_grad():
        changed = tokens.clone()
        changed[:, 9] = (changed[:, 9] + 1) % m.vocab_size
        after = model(changed, positions, None)
        result["causality"] = (after[:, :9] - logits[:, :9]).abs().max().item()
        result["change_is_seen"] = (after[:, 9:] - logits[:, 9:]).abs().amax((0, 2)).min().item()
        result["confined_document"] = deviation(
            model(tokens, positions, document_mask(17, 9))[:, 9:], model(tokens[:, 9:], positions[:, :8], None)
        )
        result["token_0_without_attention"] = token_0_leak(model, cfg, tokens, positions)
    return result


def document_mask(length: int, start: int):
    """[1, 1, S, S], True where attention is not allowed: a causal mask cut at the second document's start."""
    import torch

    position = torch.arange(length)
    later = position[None, :] > position[:, None]
    other = (position[None, :] >= start) != (position[:, None] >= start)
    return (later | other)[None, None]


def watch_projections(model) -> dict:
    """Inputs and outputs of the output projections' matrices, filled at every forward pass, [S, B, features]."""
    from megatron.core.tensor_parallel import RowParallelLinear

    seen: dict = {}

    def keep(prefix: str, linear):
        weight_product = linear._forward_impl

        def watched(input, weight, *args, **kwargs):
            output = weight_product(input, weight, *args, **kwargs)
            seen[f"{prefix}_in"], seen[f"{prefix}_out"] = input.detach(), output.detach()
            return output

        linear._forward_impl = watched

    for name, module in model.named_modules():
        if isinstance(module, RowParallelLinear):
            layer = int(name.split(".")[2])
            keep(f"layers.{layer // 2}." + ("attn.proj" if name.endswith("proj") else "mlp.fc2"), module)
    return seen


def deviation(got, wanted) -> float:
    """|| got - wanted || / || wanted ||."""
    return ((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm()).item()


def padding_probability(logits, model) -> float:
    return logits.detach().double().softmax(-1)[..., model.vocab_size :].sum().item()


def token_0_leak(model, cfg, tokens, positions) -> float:
    """Largest change of later logits when token 0 changes and attention moves nothing (all value projections zero)."""
    heads, groups = cfg.model.num_attention_heads, cfg.model.num_query_groups
    for name, param in model.named_parameters():
        if name.endswith("linear_qkv.weight"):
            param.data.view(groups, heads // groups + 2, cfg.model.head_dim, -1)[:, -1] = 0
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % cfg.model.vocab_size
    return (model(changed, positions, None)[:, 1:] - model(tokens, positions, None)[:, 1:]).abs().max().item()


if __name__ == "__main__":
    main(sys.argv[1])
