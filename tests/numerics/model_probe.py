"""Builds models through the product's own path on one process and measures them against the fp64 reference.

The tests run `torchrun model_probe.py OUT.json` and read the deviations from the file. A process of its own, because Megatron and the CPU
compatibility module change global state. `python tests/numerics/model_probe.py --only SPEC` prints those of one model, the largest first;
`--list` names the models.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "distributed")]  # where it is started by hand
from ngpt.config.activations import ACTIVATIONS  # noqa: E402

COMMON = ["experiment=ngpt_tiny", "model.num_layers=2", "model.hidden_size=48", "model.num_attention_heads=6", "model.head_dim=16"]
# One attention, MLP and Mamba layer and two of experts, odd sizes. The specs with hybrid in their names start from it.
HYBRID = [
    "experiment=ngpt_hybrid_tiny", "model.hidden_size=48", "model.num_attention_heads=6", "model.head_dim=16", "model.mamba_num_heads=6",
    "model.mamba_state_dim=5", "model.mamba_chunk_size=8",
]  # fmt: skip
SPECS = {
    "plain": ["model.num_query_groups=2", "model.ffn_hidden_size=96"],
    "gated_tied": ["model.activation=swiglu", "model.tied_embeddings=true", "model.num_query_groups=3", "model.sz_init=10"],
    "not_fine_grained": ["model.fine_grained=false"],
    "no_positions": ["model.position_embedding=none", "model.rope_base=500000"],
    "control": ["model.architecture=gpt", "model.num_query_groups=2"],
    "control_gated_tied": ["model.architecture=gpt", "model.activation=swiglu", "model.tied_embeddings=true"],
    "hybrid": ["model.position_embedding=rope"],
    "hybrid_softmax": [
        "model.activation=swiglu", "model.moe_score=softmax", "model.moe_expert_bias=false", "model.moe_aux_loss=aux_loss",
        "model.moe_router_input=unit", "model.moe_router_normalized=true", "model.mamba_gated_norm=true",
    ],
    "hybrid_not_fine_grained": [
        "model.fine_grained=false", "model.moe_shared_ffn_hidden_size=0", "model.moe_aux_loss=none", "model.moe_aux_loss_coeff=0",
        "parallel.token_dispatcher=allgather",
    ],
    "hybrid_overlap": ["parallel.shared_expert_overlap=true"],
    "hybrid_shared_suv": ["model.activation=swiglu", "model.moe_suv=shared"],
    "hybrid_top1": ["model.layer_pattern='EM*'", "model.num_layers=3", "model.moe_top_k=1", "model.mamba_conv_kernel=3"],
    "hybrid_top1_softmax": [
        "model.layer_pattern='*E'", "model.num_layers=2", "model.moe_top_k=1", "model.moe_score=softmax", "model.activation=swiglu",
        "model.moe_expert_bias=false",
    ],
    "hybrid_grouped": ["model.moe_aux_loss=none", "model.moe_aux_loss_coeff=0"],
    "hybrid_grouped_gated": ["model.activation=swiglu", "model.moe_suv=shared"],
    "control_hybrid_grouped": ["model.architecture=gpt"],
    "control_hybrid": ["model.architecture=gpt"],
    "control_hybrid_softmax": [
        "model.architecture=gpt", "model.activation=swiglu", "model.moe_score=softmax", "model.moe_expert_bias=false",
    ],
}  # fmt: skip
SPECS["hybrid_grouped_softmax"] = SPECS["hybrid_softmax"]
SPECS |= {
    "mtp": ["model.layer_pattern='*-*-/*-/*-'", "model.num_query_groups=2", "model.mtp_loss_coeff=0.5"],
    "mtp_gated_tied": [
        "model.layer_pattern='*-*-/-*'", "model.activation=swiglu", "model.tied_embeddings=true", "model.fine_grained=false",
    ],
    "control_mtp": ["model.layer_pattern='*-*-/*-/*-'", "model.architecture=gpt", "model.num_query_groups=3"],
    "mtp_hybrid": ["model.layer_pattern='ME*E-/ME/ME'"],
    "control_mtp_hybrid": ["model.layer_pattern='ME*E-/E'", "model.architecture=gpt", "model.activation=swiglu"],
}  # fmt: skip
# Activations that no model above has: each in MLP, routed and shared experts of both architectures.
for _name in (name for name in ACTIVATIONS if name not in ("squared_relu", "swiglu")):
    SPECS[f"hybrid_{_name}"] = [f"model.activation={_name}"]
    SPECS[f"control_hybrid_{_name}"] = ["model.architecture=gpt", f"model.activation={_name}"]


def main(out: str, only: str | None) -> None:
    """Measures all models, or one, in this process of torchrun's, and writes their deviations."""
    from launch.worker import install_compat

    install_compat()
    import torch
    from megatron.training.training import destroy_global_state
    from repeats import keep_what_repeats
    from trainer_model import load_model

    from ngpt.config import compose
    from ngpt.estimate.counts import count_parameters

    keep_what_repeats()
    results = {}
    for name, overrides in SPECS.items() if only is None else [(only, SPECS[only])]:
        impl = f"model.expert_impl={'grouped' if 'grouped' in name else 'sequential'}"
        common = [*HYBRID, impl] if "hybrid" in name else COMMON
        cfg = compose([*common, *overrides, f"run.root={Path(out).parent}", f"run.name={name}"])
        model = load_model(cfg)
        randomize(model, cfg)
        with torch.enable_grad():
            results[name] = compare(model, cfg)
        results[name]["parameters"] = sum(param.numel() for param in model.parameters())
        results[name]["counted"] = count_parameters(cfg.model).total
        results[name]["checkpoint"] = checkpoint_entries(model)
        destroy_global_state()
    Path(out).write_text(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()


def randomize(model, cfg) -> None:
    """Give every scale and norm weight its own values, some alphas negative."""
    import torch

    generator = torch.Generator().manual_seed(3)
    for name, bias in model.named_buffers():
        if name.endswith("expert_bias"):
            bias.data = 0.2 * torch.randn(bias.shape, generator=generator)
    for name, param in model.named_parameters():
        if param.dim() == 1:
            param.data.mul_(torch.rand(param.shape, generator=generator) + 0.5)
            if name.endswith("alpha.stored"):
                param.data.mul_(torch.where(torch.rand(param.shape, generator=generator) < 0.25, -1.0, 1.0))


def to_reference(state: dict, cfg) -> dict:
    """Megatron's parameters (or their gradients) under the reference's names; padding rows dropped."""
    model = cfg.model
    vocab, spec = model.vocab_size, spec_of(model)
    found = {"embedding": state["embedding.word_embeddings.weight"][:vocab]}
    if not model.tied_embeddings:
        found["head"] = state["output_layer.weight"][:vocab]
    kinds = {"attn": _attention, "mlp": _mlp, "mamba": _mamba, "moe": _moe}
    for layer, (prefix, kind) in blocks_by_layer(spec).items():
        names, own = OWN[kind], {name.removeprefix(layer): value for name, value in state.items() if name.startswith(layer)}
        block = kinds[kind](own, model)
        if model.architecture == "gpt":
            block["norm_before" if kind in ("mamba", "moe") else "norm"] = own[f"{names[0]}.weight"]
        else:
            block["alpha"] = own[f"{names[1]}.alpha.stored"]
        found |= {f"{prefix}.{name}": value for name, value in block.items()}
    for depth in range(spec.depths):
        found[f"mtp.{depth}.join"] = state[f"mtp.layers.{depth}.eh_proj.weight"]
        if model.architecture == "gpt":
            norms = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "norm": "final_layernorm"}
            found |= {f"mtp.{depth}.{name}": state[f"mtp.layers.{depth}.{path}.weight"] for name, path in norms.items()}
    if model.architecture == "gpt":
        found["final_norm"] = state["decoder.final_norm.weight"]
    else:
        found["sz"] = state["sz.stored"][:vocab]
    return {name: value.detach().double().clone() for name, value in found.items()}


def blocks_by_layer(spec) -> dict[str, tuple[str, str]]:
    """(prefix, kind) of each sub-block of the reference under the prefix of its layer in Megatron."""
    blocks = {f"decoder.layers.{index}.": block for index, block in enumerate(spec.sub_blocks())}
    for depth in range(spec.depths):
        blocks |= {f"mtp.layers.{depth}.mtp_model_layer.layers.{index}.": block for index, block in enumerate(spec.depth_blocks(depth))}
    return blocks


# The control's norm and nGPT's residual step, in Megatron's names.
OWN = {
    "attn": ("input_layernorm", "self_attn_bda"),
    "mlp": ("pre_mlp_layernorm", "mlp_bda"),
    "moe": ("pre_mlp_layernorm", "mlp_bda"),
    "mamba": ("norm", "mamba_bda"),
}


def _attention(own: dict, model) -> dict:
    heads, groups, dim = model.num_attention_heads, model.num_query_groups, model.head_dim
    qkv = own["self_attention.linear_qkv.weight"].view(groups, heads // groups + 2, dim, -1)
    parts = {"q": qkv[:, :-2], "k": qkv[:, -2], "v": qkv[:, -1]}
    block = {name: part.reshape(-1, part.shape[-1]) for name, part in parts.items()}
    block["proj"] = own["self_attention.linear_proj.weight"]
    return block | ({"sqk": own["self_attention.core_attention.sqk.stored"]} if model.architecture == "ngpt" else {})


def _mlp(own: dict, model) -> dict:
    return _feed_forward(own, "mlp", ACTIVATIONS[model.activation].gated)


def _feed_forward(own: dict, path: str, gated: bool) -> dict:
    block = _halves(own[f"{path}.linear_fc1.weight"], gated, "fc1", "gate", "up") | {"fc2": own[f"{path}.linear_fc2.weight"]}
    suv = own.get(f"{path}.linear_fc1.suv.stored")
    return block | ({} if suv is None else _halves(suv, gated, "suv", "suv_gate", "suv_up"))


def _halves(value, gated: bool, whole: str, *halves: str) -> dict:
    return dict(zip(halves, value.chunk(2), strict=True)) if gated else {whole: value}


def _moe(own: dict, model) -> dict:
    import torch

    for linear in ("linear_fc1", "linear_fc2") if "mlp.experts.linear_fc1.weight" in own else ():
        for e, matrix in enumerate(own[f"mlp.experts.{linear}.weight"].chunk(model.num_experts)):
            own[f"mlp.experts.local_experts.{e}.{linear}.weight"] = matrix
    if "mlp.experts.linear_fc1.suv.stored" in own:
        for e, suv in enumerate(own["mlp.experts.linear_fc1.suv.stored"].view(model.num_experts, -1)):
            own[f"mlp.experts.local_experts.{e}.linear_fc1.suv.stored"] = suv
    gated, block = ACTIVATIONS[model.activation].gated, {"router": own["mlp.router.weight"]}
    block["bias"] = own.get("mlp.router.expert_bias", torch.zeros(model.num_experts))
    experts = {f"experts.{e}": f"mlp.experts.local_experts.{e}" for e in range(model.num_experts)}
    if model.moe_shared_ffn_hidden_size:
        experts["shared"] = "mlp.shared_experts"
    for name, path in experts.items():
        block |= {f"{name}.{key}": value for key, value in _feed_forward(own, path, gated).items()}
    if "mlp.experts.suv.stored" in own:
        block |= _halves(own["mlp.experts.suv.stored"], gated, "suv", "suv_gate", "suv_up")
    return block


def _mamba(own: dict, model) -> dict:
    block = {name: own[f"mixer.{name}"] for name in ("conv1d_bias", "dt_bias", "A_log", "D")}
    block["conv_bias"] = block.pop("conv1d_bias")
    block |= {name: own[f"mixer.{name}.weight"] for name in ("in_proj", "out_proj")} | {"conv_weight": own["mixer.conv1d_weight"][:, 0]}
    optional = {"in_scale": "mixer.in_proj.mixer_in_scale.stored", "norm": "mixer.norm.weight"}
    return block | {name: own[path] for name, path in optional.items() if path in own}


def spec_of(m):
    """The reference's description of a model config."""
    from reference_model import MambaSpec, ModelSpec, MoeSpec

    trunk, *depths = m.layer_pattern.split("/")
    dense = trunk == "*-" * m.num_layers
    return ModelSpec(
        m.architecture, m.num_layers, m.hidden_size, m.ffn_hidden_size, m.num_attention_heads, m.num_query_groups, m.head_dim,
        m.vocab_size, m.activation, m.tied_embeddings, m.position_embedding == "rope", m.rope_base, m.fine_grained, m.alpha_init,
        m.norm_epsilon, None if dense else trunk,
        MoeSpec(m.num_experts, m.moe_top_k, m.moe_ffn_hidden_size, m.moe_shared_ffn_hidden_size, m.moe_score, m.moe_scaling,
                m.moe_router_input == "scaled", m.moe_suv == "shared", m.moe_aux_loss, m.moe_aux_loss_coeff),
        MambaSpec(m.mamba_num_heads, m.mamba_head_dim, m.mamba_num_groups, m.mamba_state_dim),
        m.mamba_conv_kernel, m.mamba_gated_norm, len(depths), "".join(depths[:1]), m.mtp_loss_coeff, m.sz_init,
    )  # fmt: skip


def compare(model, cfg) -> dict:
    """Relative deviations of logits, loss, gradients, projection inputs and outputs; causality and the token-0 test.

    Those two are changes of logits that must not be there, relative to the largest logit.
    """
    import torch
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from reference_model import auxiliary_loss, reference_logits, reference_loss, reference_prediction_loss

    from megatron_ext.training.health import HiddenNormProbe
    from megatron_ext.training.step import forward_step

    m, spec = cfg.model, spec_of(cfg.model)
    model.train()  # the balancing loss acts in training only; nothing else differs
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, m.vocab_size, (2, 17), generator=generator)
    labels = torch.randint(0, m.vocab_size, (2, 17), generator=generator)
    positions = torch.arange(17).expand_as(tokens)
    (seen, watched), panel = watch_projections(model, cfg), HiddenNormProbe([model])

    params = to_reference(dict(model.named_parameters()) | dict(model.named_buffers()), cfg)
    trained = {name: value.requires_grad_() for name, value in params.items() if not name.endswith("moe.bias")}
    record: dict = {}
    wanted_logits = reference_logits(params, spec, tokens, record)
    loss_mask = torch.ones(tokens.shape)
    loss_mask[:, 4:6] = 0
    wanted_loss = reference_loss(params, spec, tokens, labels, loss_mask)
    wanted_prediction = reference_prediction_loss(params, spec, tokens, labels, record, loss_mask)
    balancing = auxiliary_loss(record) * tokens.numel() / loss_mask.sum()  # Megatron weighs it by all tokens, masked ones, too
    (wanted_loss + wanted_prediction + balancing).backward()

    head_outputs = watch_head(model)
    result = {"logits_looked_at": deviation(model(tokens, positions, None)[..., : m.vocab_size], wanted_logits)}
    result["expert_input_norm"] = seen.pop("expert_input_norm", None)
    result |= {f"seen/{name}": deviation(value.transpose(0, 1), record[name]) for name, value in seen.items()}
    for linear in watched:
        del linear.executor  # from here on as in training, without norms that change nothing
    logits = model(tokens, positions, None)
    result |= {"logits": deviation(logits[..., : m.vocab_size], wanted_logits), "padding_probability": padding_probability(logits, m)}
    depth_logits = list(head_outputs[:-1])  # the last loss is the model's own
    result |= {f"mtp_logits/{d}": deviation(x[..., : m.vocab_size], record[f"mtp.{d}.logits"]) for d, x in enumerate(depth_logits)}
    MTPLossLoggingHelper.tracker.clear()
    panel.active = True
    losses, loss_of = forward_step(iter([dict(tokens=tokens, labels=labels, loss_mask=loss_mask, position_ids=positions)]), model)
    panel.active = False
    total, count, _ = loss_of(losses)
    result["loss"] = deviation(total / count, wanted_loss)
    result |= compare_panel(model, spec, panel.drain(), record)
    for d, loss in enumerate(MTPLossLoggingHelper.tracker.get("loss_values", [])):
        result[f"mtp_loss/{d}"] = deviation(loss, record[f"mtp.{d}.loss"])
    total.backward()  # as in training: gradients of sums, and the mean is taken over the step's tokens
    gradients = to_reference({name: param.grad / loss_mask.sum() for name, param in model.named_parameters()}, cfg)
    # An expert that gets no token has no gradient in the reference, and zeros in Megatron.
    wanted = {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in trained.items()}
    result |= {f"grad/{name}": deviation(gradients[name], wanted[name]) for name in trained}
    result["experts_without_tokens"] = sum(name.endswith("fc2") and not wanted[name].any() for name in trained)

    with torch.no_grad():
        changed = tokens.clone()
        changed[:, 9] = (changed[:, 9] + 1) % m.vocab_size
        after = model(changed, positions, None)
        # Depth d (from 1) of position s reads the tokens up to s + d.
        changes = [(after - logits, 9), *((x - y, 9 - d) for d, (x, y) in enumerate(zip(head_outputs, depth_logits, strict=False), 1))]
        largest = max(x[..., : m.vocab_size].abs().max() for x in head_outputs)
        result["causality"] = max((change[:, :first].abs().max() / largest).item() for change, first in changes)
        result["change_is_seen"] = min(change[:, first:].abs().amax((0, 2)).min().item() for change, first in changes)
        if "M" not in m.layer_pattern:
            result["confined_document"] = deviation(
                model(tokens, positions, document_mask(17, 9))[:, 9:], model(tokens[:, 9:], positions[:, :8], None)
            )
        result["token_0_without_attention"] = token_0_leak(model, cfg, tokens, positions, head_outputs)
    return result


def compare_panel(model, spec, norms: dict, record: dict) -> dict:
    """What the health panel has seen of one forward pass: each layer's hidden norms, and the tokens that each expert got."""
    import torch

    from megatron_ext.training.health import expert_loads

    prefixes = {panel_name(layer): prefix for layer, (prefix, _) in blocks_by_layer(spec).items()}
    # Norms of tokens in the order [S, B].
    wanted = {name: record[f"{prefix}.hidden"].norm(dim=-1).t().flatten() for name, prefix in prefixes.items()}
    found = {"hidden_norms": max(deviation(norms[layer], wanted[layer]) for layer in norms.keys() | wanted.keys())}
    loads = expert_loads([model])
    if loads is not None:
        none = torch.zeros(loads.size(1))
        routed = torch.stack([record.get(f"{at}.loads", none).reshape(-1, loads.size(1)).sum(0).double() for at in prefixes.values()])
        found["expert_loads"] = [loads.tolist(), routed.tolist()]
    return found


def panel_name(layer: str) -> str:
    """layers.0 or mtp.0.layers.0, for the prefix of a layer in Megatron."""
    return layer.strip(".").removeprefix("decoder.").replace("mtp.layers.", "mtp.").replace(".mtp_model_layer", "")


def watch_head(model) -> list:
    """Logits [B, S, V] of each call of the output layer in the newest forward pass: of the prediction depths, then the model's own."""
    outputs: list = []
    (head,) = (module for name, module in model.named_modules() if name.endswith("output_layer"))
    model.register_forward_pre_hook(lambda *_: outputs.clear())
    # A copy, since Megatron's cross entropy works in place.
    head.register_forward_hook(lambda module, args, output: outputs.append(output[0].detach().transpose(0, 1).clone()))
    return outputs


def checkpoint_entries(model) -> list[str]:
    """What the experts' part of a checkpoint holds: name, shape and place of each tensor, without Transformer Engine's extra state."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories
    from megatron.core.parallel_state import get_data_parallel_group

    state = model.sharded_state_dict(metadata={"dp_cp_group": get_data_parallel_group(with_context_parallel=True)})
    apply_factories(state)
    entries, left = [], list(state.values())
    while left:
        entry = left.pop()
        if isinstance(entry, dict | list):
            left += entry.values() if isinstance(entry, dict) else entry
        elif "experts" in entry.key and not entry.key.endswith("_extra_state"):
            entries.append(f"{entry.key} {entry.global_shape} {entry.global_offset} {entry.replica_id}")
        assert not isinstance(entry, ShardedTensorFactory)
    return sorted(entries)


def document_mask(length: int, start: int):
    """[1, 1, S, S], True where attention is not allowed: a causal mask cut at the second document's start."""
    import torch

    position = torch.arange(length)
    later = position[None, :] > position[:, None]
    other = (position[None, :] >= start) != (position[:, None] >= start)
    return (later | other)[None, None]


def watch_projections(model, cfg) -> tuple[dict, list]:
    """Inputs and outputs of the output projections' matrices under the reference's names, [S, B, features], and the linears.

    They are filled at every forward pass while the linears have executors that look at them. Experts see tokens in another order, so
    only the largest | ||input|| - 1 | is kept of theirs, as `expert_input_norm`.
    """
    from megatron.core.tensor_parallel import RowParallelLinear

    seen, watched = {}, []
    blocks = blocks_by_layer(spec_of(cfg.model))
    projections = {"self_attention.linear_proj": "proj", "mlp.linear_fc2": "fc2", "mixer.out_proj": "out_proj"}

    def keep(prefix: str, linear):
        weight_product = linear._forward_impl

        def watched(input, weight, *args, **kwargs):
            output = weight_product(input, weight, *args, **kwargs)
            seen[f"{prefix}_in"], seen[f"{prefix}_out"] = input.detach(), output.detach()
            return output

        linear._forward_impl = watched

    def keep_norm(linear):
        weight_product = linear._forward_impl

        def watched(input, weight, *args, **kwargs):
            worst = (input.detach().double().norm(dim=-1) - 1).abs().max().item() if input.numel() else 0.0
            seen["expert_input_norm"] = max(seen.get("expert_input_norm", 0.0), worst)
            return weight_product(input, weight, *args, **kwargs)

        linear._forward_impl = watched

    for name, module in model.named_modules():
        if isinstance(module, RowParallelLinear):
            prefix = next(prefix for layer, (prefix, _) in blocks.items() if name.startswith(layer))
            path = ".".join(name.split(".")[-2:])
            if path in projections:
                keep(f"{prefix}.{projections[path]}", module)
                module.executor = lambda linear, x: linear.forward_in_backend(x)
                watched.append(module)
            else:
                keep_norm(module)
    return seen, watched


def deviation(got, wanted) -> float:
    """|| got - wanted || / || wanted ||, absolute where nothing is wanted."""
    length = wanted.detach().norm()
    return ((got.detach().double() - wanted.detach()).norm() / (length if length else 1)).item()


def padding_probability(logits, model) -> float:
    return logits.detach().double().softmax(-1)[..., model.vocab_size :].sum().item()


def token_0_leak(model, cfg, tokens, positions, head_outputs: list) -> float:
    """Largest change of later logits, relative to the largest of all, when token 0 changes and nothing moves from token to token.

    Attention and Mamba are cut off: all value projections are zero, the B of every scan is zero, so that its state stays empty, and
    its convolution sees one token.
    """
    heads, groups, inner = cfg.model.num_attention_heads, cfg.model.num_query_groups, cfg.model.mamba_num_heads * cfg.model.mamba_head_dim
    for name, param in model.named_parameters():
        if name.endswith("linear_qkv.weight"):
            param.data.view(groups, heads // groups + 2, cfg.model.head_dim, -1)[:, -1] = 0
        elif name.endswith("conv1d_weight"):
            param.data[..., :-1] = 0
            param.data[inner : inner + groups_of_state(cfg)] = 0
        elif name.endswith("conv1d_bias"):
            param.data[inner : inner + groups_of_state(cfg)] = 0
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % cfg.model.vocab_size
    model(changed, positions, None)
    after = list(head_outputs)
    model(tokens, positions, None)
    changes = [(x[:, 1:] - y[:, 1:]).abs().max() for x, y in zip(after, head_outputs, strict=True)]
    return (max(changes) / max(x[..., : cfg.model.vocab_size].abs().max() for x in head_outputs)).item()


def groups_of_state(cfg) -> int:
    """Features of B."""
    return cfg.model.mamba_num_groups * cfg.model.mamba_state_dim


def show(only: str) -> None:
    """Measures one model in a process of its own and prints its deviations."""
    from torchrun import launch

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "deviations.json"
        launch(Path(__file__), [str(out), "--only", only], processes=1)
        found = json.loads(out.read_text())[only]
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    for name in sorted(numbers, key=numbers.__getitem__, reverse=True):
        print(f"{numbers[name]:.2e}  {name}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Models as they are trained against the fp64 reference.")
    parser.add_argument("out", nargs="?", metavar="OUT.json", help="write the deviations there; under torchrun")
    parser.add_argument("--only", choices=SPECS, metavar="SPEC", help="this model alone")
    parser.add_argument("--list", action="store_true", help="print the names of the models")
    arguments = parser.parse_args()
    if not (arguments.out or arguments.only or arguments.list):
        parser.error("give --only SPEC, --list, or OUT.json under torchrun")
    return arguments


if __name__ == "__main__":
    options = read_arguments()
    if options.list:
        print("\n".join(SPECS))
    elif options.out:
        main(options.out, options.only)
    else:
        show(options.only)
