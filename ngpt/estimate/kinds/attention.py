"""Attention layers."""

from ngpt.config.schema import Config, ModelConfig
from ngpt.estimate import calibration as measured
from ngpt.estimate.collectives import gather_seconds
from ngpt.estimate.kinds.base import FP32, LayerCount, LayerEstimate, Saved, is_ngpt, written_bytes
from ngpt.estimate.rank import Layer, RankParameters, Tokens, activation_bytes, computes_norm, gpu_of
from ngpt.estimate.roofline import Work, move


class Attention(LayerEstimate):
    """Self-attention with grouped keys and values; nGPT scales its queries by sqk."""

    def count(self, model: ModelConfig) -> LayerCount:
        queries, keys = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
        matrices = model.hidden_size * (queries + 2 * keys) + queries * model.hidden_size
        return LayerCount(matrices, matrices, others=queries if is_ngpt(model) else 0)  # sqk

    def flops(self, model: ModelConfig, seq_length: int) -> int:
        """12 * S * N * K for its two products, halved because a causal token sees half the sequence on average."""
        return 6 * seq_length * model.num_attention_heads * model.head_dim

    def parameters(self, cfg: Config, layer: Layer) -> RankParameters:
        """sqk."""
        sqk = layer.linear("linear_proj").in_features
        return RankParameters(dense_scales=sqk, tensors=1) if is_ngpt(cfg.model) else RankParameters()

    def saved(self, cfg: Config, layer: Layer, tokens: Tokens) -> Saved:
        """Queries, keys, values, and output with one number a head. nGPT also keeps the first three as the projection gave them."""
        model, size = cfg.model, activation_bytes(cfg)
        qkv, proj = layer.linear("linear_qkv"), layer.linear("linear_proj")
        queries, heads = proj.in_features, model.num_attention_heads // cfg.parallel.tensor
        groups = model.num_query_groups // cfg.parallel.tensor
        core = heads * FP32
        outside = qkv.out_features * size + written_bytes(cfg, layer, proj)
        if model.architecture == "ngpt":
            outside += qkv.out_features * size + (heads + groups) * FP32
        if proj.name in layer.recipes and not computes_norm(cfg, layer, proj):
            outside += queries * size  # the attention keeps its output beside the projection's operand
        return {"core_attn": tokens.inner * core, "attention": tokens.inner * outside}

    def work(self, cfg: Config, layer: Layer, tokens: Tokens) -> tuple[Work, Work]:
        """Causal: a token sees half the sequence. Passes: the projection into queries, keys and values, and nGPT's norm of the output."""
        model, rate = cfg.model, gpu_of(cfg).rates["bf16"]
        qkv, proj = layer.linear("linear_qkv"), layer.linear("linear_proj")
        queries = proj.in_features
        keys = (qkv.out_features - queries) // 2
        flops = 4 * tokens.inner * tokens.sequence / 2 * queries
        forward = backward = 2 * qkv.out_features
        if model.architecture == "ngpt":
            output = queries * computes_norm(cfg, layer, proj)
            forward, backward = forward + 2 * output, backward + queries + keys + 3 * output
        size = tokens.inner * activation_bytes(cfg)
        return (
            Work(attention=flops / (rate * measured.ATTENTION_FORWARD_FRACTION), elementwise=move(cfg, forward * size)),
            Work(attention=2 * flops / (rate * measured.ATTENTION_BACKWARD_FRACTION), elementwise=move(cfg, backward * size)),
        )

    def links(self, cfg: Config, layer: Layer, tokens: Tokens) -> tuple[float, float]:
        """Keys and values travel around a ring of the context-parallel ranks."""
        context = cfg.parallel.context
        if context == 1:
            return 0.0, 0.0
        keys = layer.linear("linear_qkv").out_features - layer.linear("linear_proj").in_features
        ring = gather_seconds(cfg, tokens.inner * context * keys * activation_bytes(cfg), context, cfg.parallel.tensor)
        return ring, 2 * ring
