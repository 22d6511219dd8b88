"""The layer specs of nGPT and of its GPT control, for Megatron's `HybridStack`."""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ext.layers.attention import NormalizedAttention
from megatron_ext.layers.backend import Backend, with_mixin
from megatron_ext.layers.linear import NormalizedWritesStream, ReadsStream, ScaledReadsStream, WritesStream
from megatron_ext.layers.residual import NormalizedResidual


class BackendNormStack(HybridStack):
    """HybridStack whose final norm is the backend's; upstream's is Transformer Engine's wherever it runs."""

    def __init__(self, config: TransformerConfig, *args, final_norm: type, **kwargs):
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def _layers(config: TransformerConfig, *, norm, qkv, attention, proj, fc1, fc2, residual) -> HybridStackSubmodules:
    mlp = partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2), ffn_hidden_size=config.ffn_hidden_size)
    self_attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(linear_qkv=qkv, core_attention=attention, linear_proj=proj),
    )
    return HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(input_layernorm=norm, self_attention=self_attention, self_attn_bda=residual),
        ),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=mlp, mlp_bda=residual)),
    )


def ngpt_stack(config: TransformerConfig, backend: Backend, tp_group, *, alpha_init: float, fine_grained: bool) -> ModuleSpec:
    """No norms anywhere; normalised residual steps, scaled first linears, unit-norm inputs of the output projections.

    Args:
        fine_grained: normalise the input of every output projection (MODEL.md "Fine-grained"); False is the model of arXiv 2410.01131.
    """
    writes = with_mixin(NormalizedWritesStream if fine_grained else WritesStream, backend.row)
    layers = _layers(
        config,
        norm=IdentityOp,
        qkv=with_mixin(ReadsStream, backend.column),
        attention=partial(NormalizedAttention, inner=backend.attention),
        proj=writes,
        fc1=with_mixin(ScaledReadsStream, backend.column),
        fc2=writes,
        residual=ModuleSpec(module=NormalizedResidual, params=dict(config=config, alpha_init=alpha_init, tp_group=tp_group)),
    )
    return ModuleSpec(module=HybridStack, params=dict(post_layer_norm=False), submodules=layers)


def gpt_stack(config: TransformerConfig, backend: Backend) -> ModuleSpec:
    """The control: pre-norm RMSNorm, additive residuals, a final norm; everything else is the same code."""
    layers = _layers(
        config,
        norm=backend.norm,
        qkv=backend.column,
        attention=backend.attention,
        proj=backend.row,
        fc1=backend.column,
        fc2=backend.row,
        residual=get_bias_dropout_add,
    )
    return ModuleSpec(module=BackendNormStack, params=dict(final_norm=backend.norm), submodules=layers)
