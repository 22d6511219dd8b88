"""Routed experts of nGPT over Megatron's classes, and what their linears need.

Shapes: x_TD tokens of this rank's experts, sorted by expert; T counts a token once for each expert that it was sent to.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.layers.scale import ParallelScale
from megatron_ext.precision.grouped import TOKEN_MULTIPLE
from ngpt.functional import scale_tokens


class PadsTokens:
    """Mixin over an expert's `Quantizable` linear: pads its tokens with zeros where it runs in low precision.

    Zeros change nothing: they raise no block's amax, and add nothing to a weight gradient. Without tokens there is nothing to quantise.
    """

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = x_TD.size(0)
        if not self.is_executed or tokens == 0:
            return self.forward_in_backend(x_TD)
        if tokens % TOKEN_MULTIPLE == 0:
            return super().forward(x_TD)
        padded = torch.nn.functional.pad(x_TD, (0, 0, 0, -tokens % TOKEN_MULTIPLE))
        y_TF, bias = super().forward(padded)
        return y_TF[:tokens], bias


def separate_experts(experts: type) -> type:
    """Megatron's class of experts whose parameters belong to the expert-parallel optimizer, however many ranks share the experts.

    Where a single rank holds all experts, Megatron gives them to the optimizer of all other parameters. What one optimizer saved, two
    cannot load. The data-parallel groups are the same in that case, so nothing else changes.
    """

    class Experts(experts):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for param in self.parameters():
                param.allreduce = False

    Experts.__name__ = f"Separate{experts.__name__}"
    return Experts


def normalized_experts(experts: type, shared_suv: bool) -> type:
    """A class of Megatron's experts that multiplies their outputs, not their activations, by the router's probabilities.

    On the activations, in front of fc2, the fine-grained normalisation would cancel the probabilities.

    Args:
        experts: SequentialMLP or TEGroupedMLP.
        shared_suv: one suv for all experts of the layer; otherwise each expert's first linear has its own.

    Source: MODEL.md "MoE".
    """

    class Experts(experts):
        def __init__(self, num_local_experts: int, config: TransformerConfig, *args, pg_collection, **kwargs):
            super().__init__(num_local_experts, config, *args, pg_collection=pg_collection, **kwargs)
            if shared_suv:
                self.suv = _shared_suv(config, pg_collection)
            for mlp in getattr(self, "local_experts", [self]):
                mlp.linear_fc2.borrow(self.suv if shared_suv else mlp.linear_fc1.suv)

        def forward(self, x_TD: Tensor, tokens_per_expert: Tensor, probs_T: Tensor) -> tuple[Tensor, Tensor | None]:
            sizes = tokens_per_expert.tolist()
            if hasattr(self, "local_experts"):
                outputs = [expert(tokens)[0] for expert, tokens in zip(self.local_experts, x_TD.split(sizes), strict=True)]
                y_TD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
            else:
                u_TF, _ = self.linear_fc1(x_TD, sizes)
                y_TD, _ = self.linear_fc2(u_TF, sizes)
            return scale_tokens(y_TD, probs_T), None

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            if shared_suv:
                state.pop(f"{prefix}suv.stored", None)
                state |= self.suv.sharded_state_dict(f"{prefix}suv.", sharded_offsets, metadata)
            return state

    Experts.__name__ = f"Normalized{experts.__name__}"
    return Experts


def _shared_suv(config: TransformerConfig, pg_collection) -> ParallelScale:
    """Every rank holds it whole, or only its part of the features where expert and dense tensor parallelism are the same.

    Parallelism: unlike an expert's own scales it is a dense parameter: all data-parallel ranks have experts that it belongs to.
    """
    sharded = pg_collection.expt_tp.size() > 1
    assert not sharded or pg_collection.expt_tp.size() == pg_collection.tp.size()
    halves = 2 if config.gated_linear_unit else 1
    return ParallelScale(
        halves * config.moe_ffn_hidden_size // pg_collection.expt_tp.size(),
        init=1.0,
        scale=1.0,
        tp_group=pg_collection.tp,
        sharded=sharded,
        sequence_parallel=not sharded and config.sequence_parallel,
        split_halves=config.gated_linear_unit,
    )
