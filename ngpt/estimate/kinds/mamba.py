"""Mamba-2 layers."""

from ngpt.config.schema import Config, ModelConfig
from ngpt.estimate import calibration as measured
from ngpt.estimate.collectives import exchange_seconds
from ngpt.estimate.kinds.base import LayerCount, LayerEstimate, Saved, is_ngpt, written_bytes
from ngpt.estimate.rank import Layer, RankParameters, Tokens, activation_bytes, computes_norm
from ngpt.estimate.roofline import Work, move


class Mamba(LayerEstimate):
    """A Mamba-2 mixer; nGPT scales in_proj's output by mixer_in_scale."""

    def count(self, model: ModelConfig) -> LayerCount:
        heads, inner = model.mamba_num_heads, model.mamba_num_heads * model.mamba_head_dim
        in_proj = inner + _conv_features(model) + heads  # z; x, B, C; dt
        matrices = model.hidden_size * (in_proj + inner)
        return LayerCount(matrices, matrices, others=_mixer_numbers(model) + (in_proj if is_ngpt(model) else 0))  # mixer_in_scale

    def flops(self, model: ModelConfig, seq_length: int) -> int:
        """3 times the forward work of convolution and scan."""
        return 3 * mamba_scan_flops(model)

    def parameters(self, cfg: Config, layer: Layer) -> RankParameters:
        """Convolution, rates and norm; mixer_in_scale."""
        parts = RankParameters(dense=_mixer_numbers(cfg.model) // cfg.parallel.tensor, tensors=6 if _has_gated_norm(cfg.model) else 5)
        if is_ngpt(cfg.model):
            parts += RankParameters(dense_scales=layer.linear("in_proj").out_features, tensors=1)
        return parts

    def saved(self, cfg: Config, layer: Layer, tokens: Tokens) -> Saved:
        """in_proj's output before and (nGPT) after its scale, the scan's output, and what out_proj keeps; the rest is computed again."""
        size, in_proj, out_proj = activation_bytes(cfg), layer.linear("in_proj"), layer.linear("out_proj")
        scaled = 2 if cfg.model.architecture == "ngpt" else 1
        numbers = (scaled * in_proj.out_features + out_proj.in_features) * size + written_bytes(cfg, layer, out_proj)
        return {"mixer": tokens.inner * numbers}

    def work(self, cfg: Config, layer: Layer, tokens: Tokens) -> tuple[Work, Work]:
        """The scan is bound by memory: passes over in_proj's output and the fp32 states at the chunks' starts."""
        model, size = cfg.model, activation_bytes(cfg)
        writer = layer.linear("out_proj")
        in_proj, out_proj = layer.linear("in_proj").out_features, writer.in_features
        states = out_proj * model.mamba_state_dim / model.mamba_chunk_size
        scanned = tokens.inner * (in_proj * size + states * 4)
        forward = backward = 0.0
        if cfg.train.micro_batch_size > 1:  # batch and sequence are transposed
            forward = backward = 2 * (in_proj + out_proj)
        if model.architecture == "ngpt":
            forward, backward = forward + 2 * in_proj, backward + 3 * in_proj
        if computes_norm(cfg, layer, writer):
            forward, backward = forward + 2 * out_proj, backward + 3 * out_proj
        return (
            Work(scan=move(cfg, measured.SCAN_FORWARD_PASSES * scanned), elementwise=move(cfg, tokens.inner * size * forward)),
            Work(scan=move(cfg, measured.SCAN_BACKWARD_PASSES * scanned), elementwise=move(cfg, tokens.inner * size * backward)),
        )

    def links(self, cfg: Config, layer: Layer, tokens: Tokens) -> tuple[float, float]:
        """Context-parallel ranks swap parts of a sequence for whole sequences of some heads, and back."""
        context = cfg.parallel.context
        if context == 1:
            return 0.0, 0.0
        numbers = layer.linear("in_proj").out_features + layer.linear("out_proj").in_features
        swap = exchange_seconds(cfg, tokens.inner * numbers * activation_bytes(cfg), context, cfg.parallel.tensor)
        return swap, swap


def mamba_scan_flops(model: ModelConfig) -> int:
    """Forward FLOPs of one token in one Mamba layer's convolution and scan, cut into chunks of Q tokens.

    Within a chunk (causal: Q/2 tokens on average): C . B for each group, 2 * N, and the weighted sum of the inputs, 2 * P a head.
    Across chunks: adding to the state and reading it, 2 * P * N a head each. Convolution: 2 a tap and feature.

    Source: Mamba-2, arXiv 2405.21060 section 6.
    """
    heads, head_dim, state, groups = model.mamba_num_heads, model.mamba_head_dim, model.mamba_state_dim, model.mamba_num_groups
    seen = model.mamba_chunk_size // 2
    within = seen * (groups * 2 * state + heads * 2 * head_dim)
    across = 2 * heads * 2 * head_dim * state
    return within + across + 2 * model.mamba_conv_kernel * _conv_features(model)


def _mixer_numbers(model: ModelConfig) -> int:
    """What a Mamba mixer trains besides matrices and nGPT's scale: convolution with bias; A_log, D, dt_bias; the gated norm."""
    norm = model.mamba_num_heads * model.mamba_head_dim if _has_gated_norm(model) else 0
    return _conv_features(model) * (model.mamba_conv_kernel + 1) + 3 * model.mamba_num_heads + norm


def _has_gated_norm(model: ModelConfig) -> bool:
    """Whether Mamba's RMSNorm after the gate is there."""
    return not is_ngpt(model) or model.mamba_gated_norm


def _conv_features(model: ModelConfig) -> int:
    """x, B and C."""
    return model.mamba_num_heads * model.mamba_head_dim + 2 * model.mamba_num_groups * model.mamba_state_dim
