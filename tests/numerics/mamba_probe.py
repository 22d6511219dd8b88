"""Builds Megatron's hybrid model with one Mamba layer on a CPU and measures it against the fp64 reference.

Run as `torchrun mamba_probe.py OUT.json`; the tests read the deviations from the file. A process of its own, because Megatron and the
CPU compatibility modules change global state.
"""

import json
import sys
from pathlib import Path

HIDDEN, VOCAB, LENGTH, CHUNK = 24, 40, 19, 8
SIZES = {"grouped": (6, 4, 2, 5), "one_group": (4, 8, 1, 3)}  # heads, head_dim, groups, state
CASES = {
    "grouped": {},
    "one_group": {"sizes": "one_group"},
    "no_norm": {"rmsnorm": False},
    "separate_kernels": {"use_mamba_mem_eff_path": False},
    "separate_kernels_no_norm": {"use_mamba_mem_eff_path": False, "rmsnorm": False},
    "documents": {"documents": True},
    "bf16": {"dtype": "bfloat16"},
}


def main(out: str) -> None:
    from launch.worker import install_compat

    install_compat()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    results = {}
    for name, options in CASES.items():
        model_parallel_cuda_manual_seed(7, force_reset_rng=True)
        results[name] = measure(**options)
    Path(out).write_text(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()


def build(sizes: str, rmsnorm: bool, dtype, use_mamba_mem_eff_path: bool):
    """Embedding, RMSNorm, mixer, residual, output layer: Megatron's hybrid model of pattern M without a final norm."""
    import torch
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ext.layers.linear import LocalColumnLinear, LocalRowLinear
    from megatron_ext.layers.norm import LocalRMSNorm

    heads, head_dim, groups, state = SIZES[sizes]
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, mamba_num_heads=heads, mamba_head_dim=head_dim, mamba_num_groups=groups,
        mamba_state_dim=state, use_mamba_mem_eff_path=use_mamba_mem_eff_path, hidden_dropout=0.0, normalization="RMSNorm",
        params_dtype=dtype, bf16=dtype == torch.bfloat16, init_method_std=0.3, gradient_accumulation_fusion=False,
        is_hybrid_model=True,
    )  # fmt: skip
    mixer = ModuleSpec(
        module=MambaMixer,
        params={"chunk_size": CHUNK, "rmsnorm": rmsnorm},
        submodules=MambaMixerSubmodules(in_proj=LocalColumnLinear, out_proj=LocalRowLinear),
    )
    layer = ModuleSpec(module=MambaLayer, submodules=MambaLayerSubmodules(norm=LocalRMSNorm, mixer=mixer, mamba_bda=get_bias_dropout_add))
    stack = ModuleSpec(module=HybridStack, params={"post_layer_norm": False}, submodules=HybridStackSubmodules(mamba_layer=layer))
    groups_of_processes = ProcessGroupCollection.use_mpu_process_groups()
    return HybridModel(config, stack, VOCAB, LENGTH, hybrid_layer_pattern="M", pg_collection=groups_of_processes)


def measure(
    sizes: str = "grouped", rmsnorm: bool = True, dtype: str = "float32", documents: bool = False, use_mamba_mem_eff_path: bool = True
) -> dict:
    """Relative deviations of the mixer's output, of the loss and of every gradient, and the checkpoint's entries of the mixer."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from reference_mamba import MambaSpec, reference_mixer

    model = build(sizes, rmsnorm, getattr(torch, dtype), use_mamba_mem_eff_path)
    generator = torch.Generator().manual_seed(3)
    for param in model.parameters():
        if param.dim() == 1:  # since equal values would hide a wrong order
            param.data.mul_(torch.rand(param.shape, generator=generator) + 0.5)
    tokens, labels = torch.randint(0, VOCAB, (2, 1 if documents else 2, LENGTH), generator=generator)
    packed = seq_idx = None
    if documents:
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 3, 10, 11, LENGTH]), total_tokens=LENGTH)
        seq_idx = torch.tensor([[0] * 3 + [1] * 7 + [2] + [3] * (LENGTH - 11)])

    seen = {}
    model.decoder.layers[0].mixer.register_forward_hook(lambda module, args, output: seen.update(mixer_out=output[0].detach()))
    loss = model(tokens, None, None, labels=labels, packed_seq_params=packed).mean()
    loss.backward()

    params = {name: param.detach().double().requires_grad_() for name, param in model.named_parameters()}
    layer, mixer = "decoder.layers.0.", {}
    for ours, name in {"conv_weight": "conv1d_weight", "conv_bias": "conv1d_bias", "dt_bias": "dt_bias", "A_log": "A_log", "D": "D",
                       "in_proj": "in_proj.weight", "out_proj": "out_proj.weight", "norm": "norm.weight"}.items():  # fmt: skip
        if f"{layer}mixer.{name}" in params:
            mixer[ours] = params[f"{layer}mixer.{name}"]
    mixer["conv_weight"] = mixer["conv_weight"][:, 0]
    h = params["embedding.word_embeddings.weight"][tokens]
    normed = h / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-5) * params[f"{layer}norm.weight"]
    wanted = reference_mixer(mixer, MambaSpec(*SIZES[sizes]), normed, seq_idx)
    logits = (h + wanted) @ params["output_layer.weight"].T
    wanted_loss = -logits.log_softmax(-1).gather(-1, labels[..., None]).mean()
    wanted_loss.backward()

    result = {"mixer_out": deviation(seen["mixer_out"].transpose(0, 1), wanted), "loss": deviation(loss, wanted_loss)}
    result |= {f"grad/{name}": deviation(param.grad, params[name].grad) for name, param in model.named_parameters()}
    return {"deviations": result, "checkpoint": checkpoint_entries(model)}


def checkpoint_entries(model) -> dict[str, list[int]]:
    """Global shapes in a distributed checkpoint, by key; weights that are stored in parts appear part by part."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    entries = {}
    for entry in model.decoder.layers[0].mixer.sharded_state_dict(prefix="").values():
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            if isinstance(part, ShardedTensor):
                entries[part.key] = list(part.global_shape)
    return entries


def deviation(got, wanted) -> float:
    """|| got - wanted || / || wanted ||."""
    return ((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm()).item()


if __name__ == "__main__":
    main(sys.argv[1])
