"""One builder for nGPT and its GPT control on Megatron's `HybridModel`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from megatron_ext.layers.backend import get_backend
from megatron_ext.layers.logits import LogitHead, logit_scale
from megatron_ext.models.stack import gpt_stack, ngpt_stack
from ngpt.config.pattern import parse
from ngpt.config.schema import ModelConfig
from ngpt.optim.retraction import is_marked, is_unretracted, mark, retract_weights_


@dataclass(kw_only=True)
class PluginModelConfig(HybridModelConfig):
    """Megatron's hybrid model plus what our layers need to know.

    Attributes:
        options: the model of our config; `vocab_size` is the vocabulary before padding.
        grouped_experts: all experts of a rank run together.
        on_built: called with the wrapped model chunks of this rank once they exist.
    """

    builder: ClassVar[str] = "megatron_ext.models.builder.PluginModelBuilder"
    options: ModelConfig
    grouped_experts: bool
    on_built: list[Callable[[list], None]] = field(default_factory=list)


class PluginModelBuilder(HybridModelBuilder):
    """Builds a pipeline chunk, marks its matrices, attaches sz, and retracts the weights before any optimizer copies them."""

    def build_model(self, pg_collection, pre_process=None, post_process=None, vp_stage=None) -> HybridModel:
        """One pipeline chunk of this rank, not yet wrapped; see `HybridModelBuilder.build_model` for the arguments."""
        config, options = self._model_config, self._model_config.options
        backend = get_backend(config.transformer.transformer_impl)
        if options.architecture == "ngpt":
            stack = ngpt_stack(config.transformer, options, backend, pg_collection.tp, config.grouped_experts)
        else:
            stack = gpt_stack(config.transformer, options, backend, config.grouped_experts)
        config.hybrid_stack_spec = stack
        model = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        if model.mtp_process and model.share_embeddings_and_output_weights:
            if not model.pre_process:
                model.output_layer.weight = None  # upstream makes one, but neither uses nor saves it
            # The depths look tokens up in this weight, too: what they add to its gradient is kept, as is what the product adds in place.
            # Upstream only sets this where the pipeline has one stage.
            model.shared_embedding_or_output_weight().zero_out_wgrad = True
        if model.post_process:
            model.sz = logit_scale(options, model.output_layer) if options.architecture == "ngpt" else None
            LogitHead(model, model.sz, options.vocab_size)
        if options.architecture == "ngpt":
            if model.pre_process or model.mtp_process:  # prediction depths have a copy of the embedding on the last stage
                mark(model.embedding.word_embeddings.weight, unit_dim=1)
            if model.post_process and model.output_layer.weight is not None:
                mark(model.output_layer.weight, unit_dim=1)
            matrices = [(name, param) for name, param in model.named_parameters() if param.dim() == 2]
            unmarked = [name for name, param in matrices if not (is_marked(param) or is_unretracted(param))]
            assert not unmarked, f"matrices that no module marked for retraction: {unmarked}"
            retract_weights_(model.parameters())
        return model

    def build_distributed_models(self, *args, **kwargs) -> list:
        _start_layer_metrics(self._model_config.transformer.num_layers, parse(self._model_config.options.layer_pattern).depths)
        chunks = super().build_distributed_models(*args, **kwargs)
        for chunk in chunks:
            if all(hasattr(param, "main_grad") for param in chunk.parameters()):  # DDP has made the gradients' buffers
                for layer in (module for name, module in chunk.named_modules() if name.endswith("output_layer")):
                    layer.gradient_accumulation_fusion = True  # see compat/weight_gradient.py
        for callback in self._model_config.on_built:
            callback(chunks)
        return chunks


def _start_layer_metrics(num_layers: int, depths: tuple[str, ...]) -> None:
    """Give Megatron's process-wide trackers of the balancing losses and of the prediction losses one entry a layer, new for each model.

    Routers index their tracker by layer, and those of a prediction depth count from 1 again. By itself Megatron would make a tracker
    with one entry for each expert layer. Only the sum over the entries is reported.
    """
    MTPLossLoggingHelper.tracker.clear()
    destroy_moe_metrics_tracker()
    for name in ("load_balancing_loss", "seq_load_balancing_loss"):
        get_moe_metrics_tracker().ensure_initialized(name, max([num_layers, *map(len, depths)]))
