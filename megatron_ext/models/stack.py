"""The layer specs of nGPT and of its GPT control, for Megatron's `HybridStack`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer, TransformerLayerSubmodules

from megatron_ext.layers.attention import NormalizedAttention, RotaryAttention, ScaledCore
from megatron_ext.layers.backend import Backend, with_mixin
from megatron_ext.layers.experts import PadsTokens, normalized_experts, separate_experts
from megatron_ext.layers.grouped import GroupedColumn, GroupedRow, GroupedScaledReadsStream
from megatron_ext.layers.linear import (
    Activates,
    LendsScale,
    MixerReadsStream,
    NormalizedWritesStream,
    ReadsStream,
    ScaledReadsStream,
    SoleWritesStream,
    WritesStream,
)
from megatron_ext.layers.prediction import JoinLinear, NormalizedJoinLinear, prediction_block
from megatron_ext.layers.residual import NormalizedResidual, SharedInput
from megatron_ext.layers.router import NormalizedRouter, SortedRouter
from ngpt.config.activations import ACTIVATIONS, Activation
from ngpt.config.schema import ModelConfig


class BackendNormStack(HybridStack):
    """HybridStack whose final norm is the backend's; upstream always takes Transformer Engine's."""

    def __init__(self, config: TransformerConfig, *args, final_norm: type, **kwargs):
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


@dataclass(frozen=True)
class Parts:
    """The parts that an architecture's layers are built from; each is a class or a builder of one.

    Attributes:
        norm: in front of every sub-block but experts, which have expert_norm. residual: the step after it.
        attention: self-attention; core: core attention. router: of the expert layers.
        qkv, fc1, in_proj: linears that read the residual stream. writes: the output projections of attention and mixer.
        mlp, shared_expert: the MLP that writes to the stream alone, and the one that is added to routed experts. fc2, shared_fc2: their
            output projections. activation: what they call between their two linears; None: what the config says.
        experts: routed experts, complete. gated_norm: whether the Mamba mixer has its RMSNorm after the gate.
        join: the projection at the start of a prediction depth.
    """

    norm: Any
    expert_norm: Any
    residual: Any
    attention: type
    core: Any
    qkv: type
    fc1: type
    in_proj: type
    writes: type
    mlp: type
    fc2: Any
    shared_expert: type
    shared_fc2: Any
    activation: type | None
    experts: Any
    router: Any
    gated_norm: bool
    join: type


def _layers(config: TransformerConfig, options: ModelConfig, parts: Parts) -> HybridStackSubmodules:
    norm, residual = parts.norm, parts.residual
    submodules = partial(MLPSubmodules, linear_fc1=parts.fc1, activation_func=parts.activation)
    dense = partial(parts.mlp.as_mlp_submodule, submodules=submodules(linear_fc2=parts.fc2), ffn_hidden_size=config.ffn_hidden_size)
    shared = partial(parts.shared_expert, submodules=submodules(linear_fc2=parts.shared_fc2))
    moe = partial(MoELayer, submodules=MoESubmodules(experts=parts.experts, shared_experts=shared, router=parts.router))
    self_attention = ModuleSpec(
        module=parts.attention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(linear_qkv=parts.qkv, core_attention=parts.core, linear_proj=parts.writes),
    )
    mixer = ModuleSpec(
        module=MambaMixer,
        params=dict(d_conv=options.mamba_conv_kernel, chunk_size=options.mamba_chunk_size, rmsnorm=parts.gated_norm),
        submodules=MambaMixerSubmodules(in_proj=parts.in_proj, out_proj=parts.writes),
    )
    return HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(input_layernorm=norm, self_attention=self_attention, self_attn_bda=residual),
        ),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=dense, mlp_bda=residual)),
        moe_layer=ModuleSpec(
            module=MoETransformerLayer,
            submodules=TransformerLayerSubmodules(pre_mlp_layernorm=parts.expert_norm, mlp=moe, mlp_bda=residual),
        ),
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=MambaLayerSubmodules(norm=norm, mixer=mixer, mamba_bda=residual)),
        mtp_block_spec=prediction_block(parts.join, norm),
    )


def ngpt_stack(config: TransformerConfig, options: ModelConfig, backend: Backend, tp_group, grouped_experts: bool) -> ModuleSpec:
    """No norms anywhere; normalised residual steps, scaled first linears, unit-norm inputs of the output projections.

    Args:
        options: the model; `fine_grained` False is the model of arXiv 2410.01131, which does not normalise those inputs.
        grouped_experts: all experts of a rank run together.
    """
    writes, shared = (SoleWritesStream, NormalizedWritesStream) if options.fine_grained else (WritesStream, WritesStream)
    activating = partial(_activating, ACTIVATIONS[options.activation])
    config.use_te_activation_func = True  # Megatron's MLPs call their submodules' activation: none, since fc2 activates
    parts = Parts(
        norm=IdentityOp,
        expert_norm=SharedInput,
        residual=ModuleSpec(module=NormalizedResidual, params=dict(config=config, alpha_init=options.alpha_init, tp_group=tp_group)),
        attention=NormalizedAttention,
        core=partial(ScaledCore, inner=backend.attention),
        qkv=with_mixin(ReadsStream, backend.column),
        fc1=with_mixin(ScaledReadsStream, backend.column),
        in_proj=with_mixin(MixerReadsStream, backend.column),
        writes=with_mixin(writes, backend.row),
        mlp=with_mixin(LendsScale, MLP),
        fc2=activating(writes, backend.row),
        shared_expert=with_mixin(LendsScale, SharedExpertMLP),
        shared_fc2=activating(shared, backend.row),
        activation=IdentityOp,
        experts=_ngpt_experts(options, backend, grouped_experts),
        router=partial(NormalizedRouter, scaled_input=options.moe_router_input == "scaled", normalized=options.moe_router_normalized),
        gated_norm=options.mamba_gated_norm,
        join=NormalizedJoinLinear,
    )
    return ModuleSpec(module=HybridStack, params=dict(post_layer_norm=False), submodules=_layers(config, options, parts))


def gpt_stack(config: TransformerConfig, options: ModelConfig, backend: Backend, grouped_experts: bool) -> ModuleSpec:
    """The control: pre-norm RMSNorm, additive residuals, a final norm; everything else is the same code."""
    parts = Parts(
        norm=backend.norm,
        expert_norm=backend.norm,
        residual=get_bias_dropout_add,
        attention=RotaryAttention,
        core=backend.attention,
        qkv=backend.column,
        fc1=backend.column,
        in_proj=backend.column,
        writes=backend.row,
        mlp=MLP,
        fc2=backend.row,
        shared_expert=SharedExpertMLP,
        shared_fc2=backend.row,
        activation=None,
        experts=_gpt_experts(backend, grouped_experts),
        router=SortedRouter,
        gated_norm=True,
        join=JoinLinear,
    )
    layers = _layers(config, options, parts)
    return ModuleSpec(module=BackendNormStack, params=dict(final_norm=backend.norm), submodules=layers)


def _activating(activation: Activation, writes: type, row: type) -> Callable:
    """A builder of output projections that apply the activation to their input."""
    return partial(with_mixin(Activates, with_mixin(writes, row)), activation=activation)


def _ngpt_experts(options: ModelConfig, backend: Backend, grouped: bool) -> Callable:
    shared_suv = options.moe_suv == "shared"
    reads = ReadsStream if shared_suv else GroupedScaledReadsStream if grouped else ScaledReadsStream
    writes = NormalizedWritesStream if options.fine_grained else WritesStream
    base, fc1, fc2 = _expert_parts(backend, grouped)
    experts = normalized_experts(base, shared_suv)
    return _experts(experts, with_mixin(reads, fc1), _activating(ACTIVATIONS[options.activation], writes, fc2), grouped, IdentityOp)


def _gpt_experts(backend: Backend, grouped: bool) -> Callable:
    return _experts(*_expert_parts(backend, grouped), grouped)


def _expert_parts(backend: Backend, grouped: bool) -> tuple[type, type, type]:
    """Megatron's class of experts and the two linears for it: the backend's, or the grouped ones, which need no backend."""
    if grouped:
        return separate_experts(TEGroupedMLP), GroupedColumn, GroupedRow
    return separate_experts(SequentialMLP), with_mixin(PadsTokens, backend.column), with_mixin(PadsTokens, backend.row)


def _experts(experts: type, fc1: type, fc2: Any, grouped: bool, activation: type | None = None) -> Callable:
    submodules = GroupedMLPSubmodules if grouped else MLPSubmodules
    return partial(experts, submodules=submodules(linear_fc1=fc1, linear_fc2=fc2, activation_func=activation))
