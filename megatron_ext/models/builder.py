"""One builder for nGPT and its GPT control on Megatron's `HybridModel`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from megatron_ext.layers.backend import get_backend
from megatron_ext.layers.logits import finish_logits, logit_scale
from megatron_ext.models.stack import gpt_stack, ngpt_stack
from ngpt.optim.retraction import is_marked, mark, retract_weights_


@dataclass(kw_only=True)
class PluginModelConfig(HybridModelConfig):
    """Megatron's hybrid model plus what our layers need to know.

    Attributes:
        architecture: ngpt | gpt.
        real_vocab_size: vocabulary entries before padding.
        on_built: called with the wrapped model chunks of this rank once they exist.
    """

    builder: ClassVar[str] = "megatron_ext.models.builder.PluginModelBuilder"
    architecture: str
    fine_grained: bool
    alpha_init: float
    real_vocab_size: int
    on_built: list[Callable[[list], None]] = field(default_factory=list)


class PluginModelBuilder(HybridModelBuilder):
    """Builds a pipeline chunk, marks its matrices, attaches sz, and retracts the weights before any optimizer copies them."""

    def build_model(self, pg_collection, pre_process=None, post_process=None, vp_stage=None) -> HybridModel:
        """One pipeline chunk of this rank, not yet wrapped; see `HybridModelBuilder.build_model` for the arguments."""
        config = self._model_config
        backend = get_backend(config.transformer.transformer_impl)
        if config.architecture == "ngpt":
            stack = ngpt_stack(
                config.transformer, backend, pg_collection.tp, alpha_init=config.alpha_init, fine_grained=config.fine_grained
            )
        else:
            stack = gpt_stack(config.transformer, backend)
        config.hybrid_stack_spec = stack
        model = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        if model.post_process:
            model.sz = logit_scale(config.transformer.hidden_size, model.output_layer) if config.architecture == "ngpt" else None
            finish_logits(model.output_layer, model.sz, config.real_vocab_size)
        if config.architecture == "ngpt":
            if model.pre_process:
                mark(model.embedding.word_embeddings.weight, unit_dim=1)
            if model.post_process and model.output_layer.weight is not None:
                mark(model.output_layer.weight, unit_dim=1)
            unmarked = [name for name, param in model.named_parameters() if param.dim() == 2 and not is_marked(param)]
            assert not unmarked, f"matrices that no module marked for retraction: {unmarked}"
            retract_weights_(model.parameters())
        return model

    def build_distributed_models(self, *args, **kwargs) -> list:
        chunks = super().build_distributed_models(*args, **kwargs)
        for callback in self._model_config.on_built:
            callback(chunks)
        return chunks
