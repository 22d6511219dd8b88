"""nGPT, the transformer whose matrices and hidden states live on the unit sphere, and its GPT control, in plain PyTorch.

One file, to be read as the definition. A layer is one sub-block b of attention, MLP, mixture of experts or Mamba-2, and one step:

    nGPT:     h <- normalize(g + |alpha| * (normalize(b(h)) - g)),  g = normalize(h)
    control:  h <- h + b(rms_norm(h))

Every matrix that reads the stream has rows of unit norm, every one that writes to it columns. There is no other norm, and trained scales
give magnitudes back: sqk to queries and keys, suv to MLPs, in_scale to Mamba, logit_scale to the logits. Scales are kept as they were
trained, and used times a factor written beside each. Sums, norms, scales, router and Mamba's state are fp32 (fp64 for fp64), rounded once.

Decoding a token takes hundreds of small operations. So layers read the config once, when they are made, since each read takes
transformers microseconds, and a single token needs neither mask nor scan.

Shapes: B batch, S tokens of this call, T all tokens in a row, D hidden, N query heads, G key/value heads, K head dimension, F width of an
MLP, E experts, V vocabulary. Mamba-2: H heads of P features, G groups of R heads that share B and C, N state size, C chunks of Q tokens.

Source: nGPT, arXiv 2410.01131; Normalized Architectures are Natively 4-Bit, arXiv 2605.06067; Mamba-2, arXiv 2405.21060.
"""

import dataclasses
import inspect
from collections.abc import Callable
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_ngpt import LAYER_TYPES, NGPTConfig

EPS = 1e-12  # of every l2_normalize
MIXER_NORM_EPS = 1e-5  # of the RMSNorm after Mamba's gate: a constant of the trainer's mixer
STORED = {"alpha": -0.5, "sqk": -0.5, "logit_scale": -0.5, "suv": 0.0, "in_scale": 0.0}  # a scale starts at hidden_size to this power
# What transformers calls the cache, in arguments and outputs: past_key_values up to 5.20, then cache.
CACHE = "cache" if "cache" in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"


def widen(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is: the arithmetic between matrix products."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def l2_normalize(x: Tensor, dim: int = -1) -> Tensor:
    """x / sqrt(sum(x^2) + EPS), rounded to x's dtype once; a zero row gives zero. Source: arXiv 2410.01131 section 2."""
    y = widen(x)
    norm = torch.linalg.vector_norm(y, dim=dim, keepdim=True)
    return (y / torch.hypot(norm, torch.full_like(norm, sqrt(EPS)))).type_as(x)


def lerp_retract(h_BSD: Tensor, b_BSD: Tensor, alpha_D: Tensor) -> Tensor:
    """The residual step: from h towards b, channel by channel, and back to the sphere. Source: arXiv 2410.01131 equations 10, 11."""
    g_BSD, n_BSD = l2_normalize(widen(h_BSD)), l2_normalize(widen(b_BSD))
    return l2_normalize(torch.lerp(g_BSD, n_BSD, alpha_D.abs().type_as(g_BSD))).type_as(h_BSD)


def rotate(x_BSNK: Tensor, cos_BS1K: Tensor, sin_BS1K: Tensor) -> Tensor:
    """Features a = i and b = i + K/2 turn together, to a cos - b sin and b cos + a sin. Source: arXiv 2104.09864."""
    return torch.addcmul(x_BSNK * cos_BS1K, x_BSNK.roll(x_BSNK.shape[-1] // 2, -1), sin_BS1K)


def rotary_angles(position_ids_BS: Tensor, config: NGPTConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * theta^(-2i/K) for features i and i + K/2, each [B, S, 1, K]; those of -angle for the first half."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=dtype, device=position_ids_BS.device) / config.head_dim
    power = config.rope_theta**exponent
    angle = position_ids_BS[..., None, None].to(dtype) / torch.cat([-power, power])
    return angle.cos(), angle.sin()


def ssd_scan(
    x_BSHP: Tensor, dt_BSH: Tensor, A_H: Tensor, B_BSGN: Tensor, C_BSGN: Tensor, chunk_size: int, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """state_t = exp(dt_t A) state_(t-1) + dt_t x_t (outer) B_t and y_t = state_t C_t, from a state to y [B, S, H, P] and the last state.

    Tokens of a chunk reach each other through one triangular matrix a head, earlier ones through the state at the chunk's start. The chunk
    size is no part of the function; of one token the recurrence is taken as it is. Source: Mamba-2, arXiv 2405.21060 section 6.
    """
    length, groups, size = x_BSHP.shape[1], B_BSGN.shape[2], min(chunk_size, x_BSHP.shape[1])
    if length == 1:
        B_BHN, C_BHN = (v_BSGN[:, 0].repeat_interleave(x_BSHP.shape[2] // groups, dim=1) for v_BSGN in (B_BSGN, C_BSGN))
        kept_BH, u_BHP = (dt_BSH * A_H).exp()[:, 0], (dt_BSH[..., None] * x_BSHP)[:, 0]
        state_BHPN = kept_BH[..., None, None] * state_BHPN + u_BHP[..., None] * B_BHN[:, :, None]
        return (state_BHPN @ C_BHN[..., None]).squeeze(-1)[:, None], state_BHPN

    def cut(t: Tensor) -> Tensor:
        """[B, S, ...] -> [B, C, Q, ...]; tokens with dt 0 fill up the last chunk: they neither decay nor feed the state."""
        return F.pad(t, (0, 0) * (t.dim() - 2) + (0, -length % size)).unflatten(1, (-1, size))

    u_BCQGRP = cut(x_BSHP * dt_BSH[..., None]).unflatten(3, (groups, -1))
    exponent_BCGRQ = cut(dt_BSH * A_H).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)
    B_BCQGN, C_BCQGN = cut(B_BSGN), cut(C_BSGN)

    # Within a chunk: what is left at token i of what token j wrote, exp(sum of the exponents after j, up to i); 0 for later j. The sums are
    # taken one by one, since differences of long sums would round.
    reached = torch.ones(size, size, dtype=torch.bool, device=x_BSHP.device).tril()
    each = exponent_BCGRQ[..., None].expand(*exponent_BCGRQ.shape, size).masked_fill(~reached.tril(-1), 0)
    decay_BCGRQQ = each.cumsum(-2).masked_fill(~reached, -torch.inf).exp()
    scores_BCGQQ = torch.einsum("bcign,bcjgn->bcgij", C_BCQGN, B_BCQGN)
    y_BCQGRP = torch.einsum("bcgrij,bcjgrp->bcigrp", scores_BCGQQ[:, :, :, None] * decay_BCGRQQ, u_BCQGRP)

    # Across chunks: the state at each chunk's start, one after the other.
    added_BCGRPN = torch.einsum("bcgrj,bcjgrp,bcjgn->bcgrpn", decay_BCGRQQ[..., -1, :], u_BCQGRP, B_BCQGN)
    kept_BCGRQ = exponent_BCGRQ.cumsum(-1).exp()
    state_BGRPN, starts = state_BHPN.unflatten(1, (groups, -1)), []
    for kept_BGR, added_BGRPN in zip(kept_BCGRQ[..., -1].unbind(1), added_BCGRPN.unbind(1), strict=True):
        starts.append(state_BGRPN)
        state_BGRPN = kept_BGR[..., None, None] * state_BGRPN + added_BGRPN
    y_BCQGRP = y_BCQGRP + torch.einsum("bcign,bcgrpn,bcgri->bcigrp", C_BCQGN, torch.stack(starts, 1), kept_BCGRQ)
    return y_BCQGRP.flatten(3, 4).flatten(1, 2)[:, :length], state_BGRPN.flatten(1, 2)


def attend(
    module: nn.Module, q_BNSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs
) -> tuple[Tensor, Tensor]:
    """Attention written out, for `attn_implementation="eager"`: outputs [B, S, N, K] and weights [B, N, S, T]. The mask is added."""
    k_BNTK, v_BNTK = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k_BGTK, v_BGTK))
    scores_BNST = widen(q_BNSK @ k_BNTK.transpose(-1, -2) * scaling)
    if attention_mask is not None:
        scores_BNST = scores_BNST + attention_mask
    weights_BNST = scores_BNST.softmax(-1).to(v_BNTK.dtype)
    return (weights_BNST @ v_BNTK).transpose(1, 2), weights_BNST


def sees_all(attention_mask: Tensor | None, cache: Cache | None) -> bool:
    """Whether the newest token needs no mask: no padding comes before it, and the cache has no room for later ones. Compiled code: no."""
    if torch.compiler.is_compiling() or getattr(cache, "is_compileable", False):
        return False
    return attention_mask is None or (attention_mask.dim() == 2 and bool(attention_mask.all()))


def new_scale(*shape: int) -> nn.Parameter:
    """A trained scale or another small parameter. It is fp32 whatever the model's dtype is, and `from_pretrained` keeps it so."""
    return nn.Parameter(torch.empty(shape, dtype=torch.float32))


def mark(module: nn.Module, config: NGPTConfig, **unit_dims: int) -> nn.Module:
    """Notes which parameters of a module have unit norm in nGPT, and along which dimension: the one of the stream."""
    module.unit_dims = unit_dims if config.is_ngpt else {}
    return module


def reads_stream(config: NGPTConfig, features: int) -> nn.Linear:
    """A projection out of the stream: its rows have unit norm."""
    return mark(nn.Linear(config.hidden_size, features, bias=False), config, weight=-1)


def writes_stream(config: NGPTConfig, features: int) -> nn.Linear:
    """A projection into the stream: its columns have unit norm."""
    return mark(nn.Linear(features, config.hidden_size, bias=False), config, weight=-2)


class NGPTRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, each of `groups` parts of the features with its own mean. The control's; nGPT has none."""

    def __init__(self, features: int, eps: float, groups: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps, self.groups = eps, groups

    def forward(self, x: Tensor) -> Tensor:
        parts = widen(x).unflatten(-1, (self.groups, -1))
        y = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)
        return (y.flatten(-2) * self.weight).to(x.dtype)


class NGPTAttention(nn.Module):
    """Causal attention with grouped keys and values.

    nGPT: q <- sqk^2 * normalize(q) and k <- normalize(k) in each head, after the rotation, and scores times sqrt(K), not over it.
    Source: MODEL.md "Attention"; arXiv 2410.01131 section 2.3.2.
    """

    def __init__(self, config: NGPTConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim, self.is_causal = config, layer_idx, config.head_dim, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = sqrt(self.head_dim) if config.is_ngpt else 1 / sqrt(self.head_dim)
        self.normalizes_operands, self.sqk_factor = config.normalizes_operands, sqrt(config.hidden_size)
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (reads_stream(config, features) for features in (queries, keys, keys))
        self.o_proj = writes_stream(config, queries)
        self.sqk = new_scale(queries) if config.is_ngpt else None

    def forward(
        self,
        h_BSD: Tensor,
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*h_BSD.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(h_BSD).view(heads), self.k_proj(h_BSD).view(heads), self.v_proj(h_BSD).view(heads)
        qk = widen(torch.cat([q, k], dim=-2))
        if rotary is not None:
            qk = rotate(qk, *rotary)
        if self.sqk is not None:
            qk = l2_normalize(qk)
        q, k = qk.tensor_split((q.shape[-2],), dim=-2)
        if self.sqk is not None:
            q = q * (self.sqk.type_as(q) * self.sqk_factor).view(-1, self.head_dim).square()
        q_BNSK, k_BGSK, v_BGSK = q.type_as(v).transpose(1, 2), k.type_as(v).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k_BGSK, v_BGSK = cache.update(k_BGSK, v_BGSK, self.layer_idx)

        function: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attend)
        o_BSNK, weights = function(self, q_BNSK, k_BGSK, v_BGSK, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        o_BSF = o_BSNK.reshape(*h_BSD.shape[:-1], -1)
        if self.normalizes_operands:
            o_BSF = l2_normalize(o_BSF)
        return self.o_proj(o_BSF), weights


class Activation:
    """What an MLP does between its projections, [..., F] or [..., 2 F] (gate, then up) to [..., F]. Source: MODEL.md "MLP".

    nGPT: u <- suv * sqrt(D) * u; then f(u), or f(gate) * up; fine-grained: unit norm over all F features.
    """

    def __init__(self, config: NGPTConfig):
        self.function, self.is_gated = ACT2FN[config.hidden_act], config.gated_mlp
        self.normalizes, self.suv_factor = config.normalizes_operands, sqrt(config.hidden_size)

    def __call__(self, u: Tensor, suv: Tensor | None) -> Tensor:
        a = widen(u)
        if suv is not None:
            a = a * (suv.type_as(a) * self.suv_factor)
        if self.is_gated:
            gate, up = a.chunk(2, dim=-1)
            a = self.function(gate) * up
        else:
            a = self.function(a)
        return (l2_normalize(a) if self.normalizes else a).type_as(u)


class NGPTMLP(nn.Module):
    """down(activate(up(h))), the activation with nGPT's scale and norm; gated ones with a gate projection. Source: MODEL.md "MLP"."""

    def __init__(self, config: NGPTConfig, layer_idx: int | None = None, width: int | None = None):
        super().__init__()
        self.activate, width = Activation(config), width or config.intermediate_size
        if config.gated_mlp:
            self.gate_proj = reads_stream(config, width)
        self.up_proj, self.down_proj = reads_stream(config, width), writes_stream(config, width)
        self.suv = new_scale(2 * width if config.gated_mlp else width) if config.is_ngpt else None

    def forward(self, h_BSD: Tensor, **_) -> Tensor:
        u = self.up_proj(h_BSD)
        if self.activate.is_gated:
            u = torch.cat([self.gate_proj(h_BSD), u], dim=-1)
        return self.down_proj(self.activate(u, self.suv))


class NGPTRouter(nn.Module):
    """The k experts with the largest score + bias, and their scores as weights; fp32. Source: MODEL.md "Router"."""

    def __init__(self, config: NGPTConfig):
        super().__init__()
        self.input_factor = sqrt(config.hidden_size) if config.is_ngpt and config.router_input == "scaled" else None
        self.is_sigmoid, self.top_k = config.router_score == "sigmoid", config.num_experts_per_tok
        self.scaling = config.routed_scaling_factor
        self.weight = new_scale(config.n_routed_experts, config.hidden_size)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        mark(self, config, **({"weight": -1} if config.router_normalized else {}))

    def forward(self, h_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], weights [T, k] and experts [T, k] of each token."""
        with torch.autocast(h_TD.device.type, enabled=False):
            logits_TE = F.linear(widen(h_TD), self.weight.to(widen(h_TD).dtype))
        if self.input_factor is not None:
            logits_TE = logits_TE * self.input_factor
        scores_TE = logits_TE.sigmoid() if self.is_sigmoid else logits_TE.softmax(-1)
        experts_Tk = (scores_TE + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
        weights_Tk = scores_TE.gather(-1, experts_Tk)
        if self.top_k > 1:
            weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + 1e-20)
        return logits_TE, weights_Tk * self.scaling, experts_Tk


class NGPTExperts(nn.Module):
    """The routed experts of a layer, each an MLP. Weights multiply their outputs: before the output projection a norm would cancel them.

    A library's fused experts know neither suv nor the norm, so they cannot replace this.
    """

    def __init__(self, config: NGPTConfig):
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.activate = Activation(config)
        self.up_name, up_width = "gate_up_proj" if config.gated_mlp else "up_proj", (1 + config.gated_mlp) * width
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(experts, up_width, hidden)))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        mark(self, config, **{self.up_name: -1, "down_proj": -2})
        self.suv = new_scale(*(() if config.shared_suv else (experts,)), up_width) if config.is_ngpt else None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of a token's weighted experts, [T, D]; index and weights are [T, k]."""
        experts = len(self.down_proj)
        suvs = [None] * experts if self.suv is None else self.suv.expand(experts, -1).unbind()
        tokens_per_expert = top_k_index.flatten().bincount(minlength=experts).tolist()
        places = top_k_index.flatten().argsort(stable=True).split(tokens_per_expert)
        y_TD = torch.zeros_like(widen(hidden_states))
        matrices = zip(getattr(self, self.up_name).unbind(), self.down_proj.unbind(), suvs, places, strict=True)
        for expert, (up, down, suv, place) in enumerate(matrices):
            if len(place):
                token = place // top_k_index.shape[-1]
                a = self.activate(self.project(hidden_states[token], up, self.up_name, expert), suv)
                y = self.project(a, down, "down_proj", expert)
                y_TD.index_add_(0, token, y * top_k_weights.flatten()[place, None].to(y_TD.dtype))
        return y_TD.to(hidden_states.dtype)

    def project(self, x_TK: Tensor, weight_NK: Tensor, name: str, expert: int) -> Tensor:
        """One projection of one expert's tokens. What hooks are to linear layers, a replacement of this is to experts."""
        return F.linear(x_TK, weight_NK)


class NGPTMoE(nn.Module):
    """Routed experts, and one that sees every token. Source: MODEL.md "MoE"."""

    def __init__(self, config: NGPTConfig, layer_idx: int | None = None):
        super().__init__()
        self.gate, self.experts = NGPTRouter(config), NGPTExperts(config)
        shared = config.moe_shared_expert_intermediate_size
        self.shared_experts = NGPTMLP(config, width=shared) if shared else None

    def forward(self, h_BSD: Tensor, **_) -> Tensor:
        h_TD = h_BSD.flatten(0, -2)
        _, weights_Tk, experts_Tk = self.gate(h_TD)
        y_BSD = self.experts(h_TD, experts_Tk, weights_Tk).view_as(h_BSD)
        return y_BSD if self.shared_experts is None else y_BSD + self.shared_experts(h_BSD)


class NGPTMamba2(nn.Module):
    """Mamba-2: projection, short convolution, scan and gate. Source: MODEL.md "Mamba-2 mixer".

    nGPT: in_scale * sqrt(D) multiplies z, x, B, C and dt, and fine-grained normalisation takes the place of the norm after the gate.
    """

    def __init__(self, config: NGPTConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.heads, self.head_dim = layer_idx, config.mamba_num_heads, config.mamba_head_dim
        self.groups, self.state_size, self.chunk_size = config.n_groups, config.ssm_state_size, config.chunk_size
        self.before, self.normalizes_operands, self.in_factor = config.conv_kernel - 1, config.normalizes_operands, sqrt(config.hidden_size)
        self.inner, heads = self.heads * self.head_dim, self.heads
        self.features = self.inner + 2 * self.groups * self.state_size  # of x, B and C
        self.in_proj = reads_stream(config, self.inner + self.features + heads)
        self.in_scale = new_scale(self.inner + self.features + heads) if config.is_ngpt else None
        self.conv1d = nn.Conv1d(self.features, self.features, config.conv_kernel, groups=self.features)  # holds the filters
        self.dt_bias, self.A_log, self.D = new_scale(heads), new_scale(heads), new_scale(heads)
        self.norm = NGPTRMSNorm(self.inner, MIXER_NORM_EPS, self.groups) if config.has_mixer_norm else None
        self.out_proj = writes_stream(config, self.inner)

    def forward(self, h_BSD: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None, **_) -> Tensor:
        """attention_mask [B, S], False where a token is padding: it enters neither convolution nor state."""
        zxBCdt = self.in_proj(h_BSD)
        if self.in_scale is not None:
            wide = widen(zxBCdt)
            zxBCdt = (wide * (self.in_scale.type_as(wide) * self.in_factor)).type_as(zxBCdt)
        z_BSF, xBC_BSF, dt_BSH = zxBCdt.split_with_sizes([self.inner, self.features, self.heads], dim=-1)
        dt_BSH = F.softplus(widen(dt_BSH) + self.dt_bias)
        if attention_mask is not None:
            is_padding = ~attention_mask[..., None]
            xBC_BSF, dt_BSH = xBC_BSF.masked_fill(is_padding, 0), dt_BSH.masked_fill(is_padding, 0)
        y_BSF = self.scan(self.convolve(xBC_BSF, cache), dt_BSH, cache) * F.silu(widen(z_BSF))
        if self.norm is not None:
            y_BSF = self.norm(y_BSF)
        if self.normalizes_operands:
            y_BSF = l2_normalize(y_BSF)
        return self.out_proj(y_BSF.type_as(zxBCdt))

    def convolve(self, xBC_BSF: Tensor, cache: Cache | None) -> Tensor:
        """SiLU of each feature's filter over a token and those before it, of which the cache holds conv_kernel - 1."""
        length, before = xBC_BSF.shape[1], self.before
        window_BFS = xBC_BSF.transpose(1, 2)
        if cache is not None:
            window_BFS = cache.update_conv_state(window_BFS, self.layer_idx, conv_kernel_size=before)
        window_BFS = widen(F.pad(window_BFS, (before, 0))[..., -(before + length) :])
        out_BFS = self.conv1d.bias.type_as(window_BFS)[:, None]
        for lag, tap_F1 in enumerate(self.conv1d.weight.type_as(window_BFS).unbind(-1)):
            out_BFS = torch.addcmul(out_BFS, window_BFS[..., lag : lag + length], tap_F1)
        return F.silu(out_BFS).type_as(xBC_BSF).transpose(1, 2)

    def scan(self, xBC_BSF: Tensor, dt_BSH: Tensor, cache: Cache | None) -> Tensor:
        """The state-space recurrence and its skip D * x, [B, S, inner]; the cache's state goes in and the last one out."""
        vectors = self.groups * self.state_size
        x, B, C = widen(xBC_BSF).split_with_sizes([self.inner, vectors, vectors], dim=-1)
        x_BSHP = x.unflatten(-1, (-1, self.head_dim))
        B_BSGN, C_BSGN = (v.unflatten(-1, (self.groups, -1)) for v in (B, C))
        state_BHPN = None if cache is None else cache.layers[self.layer_idx].recurrent_states[0]
        if state_BHPN is None:
            state_BHPN = x_BSHP.new_zeros(len(x), *x_BSHP.shape[2:], self.state_size)
        A_H = -self.A_log.type_as(x).exp()
        with torch.autocast(x.device.type, enabled=False):
            y_BSHP, state_BHPN = ssd_scan(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, self.chunk_size, state_BHPN)
        if cache is not None:
            cache.update_recurrent_state(state_BHPN, self.layer_idx)
        return (y_BSHP + self.D[:, None] * x_BSHP).flatten(2)


MIXERS = {"*": NGPTAttention, "-": NGPTMLP, "M": NGPTMamba2, "E": NGPTMoE}


class NGPTLayer(GradientCheckpointingLayer):
    """A sub-block and the residual step after it. Source: MODEL.md "Residual step"."""

    def __init__(self, config: NGPTConfig, layer_idx: int):
        super().__init__()
        symbol = config.layer_pattern[layer_idx]
        self.kind, self.mixer = LAYER_TYPES[symbol], MIXERS[symbol](config, layer_idx)
        self.is_ngpt, self.alpha_factor = config.is_ngpt, config.alpha_init * sqrt(config.hidden_size)
        if config.is_ngpt:
            self.alpha = new_scale(config.hidden_size)
        else:
            self.norm = NGPTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h_BSD: Tensor, **kwargs) -> Tensor:
        b_BSD = self.mixer(h_BSD if self.is_ngpt else self.norm(h_BSD), **kwargs)
        b_BSD = b_BSD[0] if isinstance(b_BSD, tuple) else b_BSD
        if not self.is_ngpt:
            return h_BSD + b_BSD
        return lerp_retract(h_BSD, b_BSD, widen(self.alpha) * self.alpha_factor)


class NGPTPreTrainedModel(PreTrainedModel):
    config_class = NGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NGPTLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": NGPTLayer, "attentions": NGPTAttention}
    _keys_to_ignore_on_load_unexpected = [r"^mtp\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Random weights, of unit norm where nGPT has it; scales where training starts. What was loaded stays (`transformers.init`)."""
        for name, param in module.named_parameters(recurse=False):
            if name in STORED:
                init.constant_(param, self.config.hidden_size ** STORED[name])
            elif name == "D" or isinstance(module, NGPTRMSNorm):
                init.ones_(param)
            elif name == "A_log":
                init.copy_(param, torch.empty_like(param).uniform_(1, 16).log())
            elif name == "dt_bias":  # the softplus of it is between 1e-3 and 1e-1
                dt = 10 ** torch.empty_like(param).uniform_(-3, -1)
                init.copy_(param, dt + torch.log(-torch.expm1(-dt)))
            elif isinstance(module, nn.Conv1d):
                bound = self.config.conv_kernel**-0.5
                init.uniform_(param, -bound, bound)
            else:
                drawn = torch.empty_like(param).normal_(std=self.config.initializer_range)
                dim = getattr(module, "unit_dims", {}).get(name)
                init.copy_(param, drawn if dim is None else l2_normalize(drawn, dim))
        if isinstance(module, NGPTRouter):
            init.zeros_(module.e_score_correction_bias)

    @torch.no_grad()
    def retract_(self) -> None:
        """Gives every matrix of nGPT its unit norm back, as training does after each optimizer step; the control has none.

        With the Trainer:

            class RetractCallback(TrainerCallback):
                def on_step_end(self, args, state, control, model=None, **kwargs):
                    model.retract_()

            Trainer(model=model, callbacks=[RetractCallback()], ...)

        Weight decay must be 0: it would do nothing to the matrices, and shrink the scales. Source: MODEL.md "Equations".
        """
        for module in self.modules():
            for name, dim in getattr(module, "unit_dims", {}).items():
                param = module.get_parameter(name)
                param.copy_(l2_normalize(param, dim))

    @staticmethod
    def create_masks_for_generate(
        config: NGPTConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_,
    ) -> dict[str, Tensor | None]:
        """The mask of each kind of layer: attention's as its implementation wants it, Mamba's [B, S], False where a token is padding."""
        masks, cache = {}, past_key_values if cache is None else cache
        if inputs_embeds.shape[1] == 1 and sees_all(attention_mask, cache):
            return masks
        if "*" in config.layer_pattern:
            past = {CACHE: cache}
            masks["full_attention"] = create_causal_mask(config, inputs_embeds, attention_mask, position_ids=position_ids, **past)
        if attention_mask is not None and attention_mask.dim() == 2 and inputs_embeds.shape[1] > 1:  # a token that follows is not padding
            masks["linear_attention"] = attention_mask[:, -inputs_embeds.shape[1] :].bool()
        return masks


class NGPTModel(NGPTPreTrainedModel):
    """Embeddings and layers; the stream, after the control's last norm."""

    def __init__(self, config: NGPTConfig):
        super().__init__(config)
        self.embeddings = mark(nn.Embedding(config.vocab_size, config.hidden_size), config, weight=-1)
        self.layers = nn.ModuleList(NGPTLayer(config, index) for index in range(config.num_hidden_layers))
        if not config.is_ngpt:
            self.norm_f = NGPTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = mark(value, self.config, weight=-1)

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """See `NGPTForCausalLM.forward`; last_hidden_state is [B, S, D]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        h_BSD = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.training and torch.is_grad_enabled() and any(layer.gradient_checkpointing for layer in self.layers):
            cache, use_cache = None, False  # layers that are recomputed would write to it again
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self.positions(h_BSD, attention_mask, cache)
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = self.create_masks_for_generate(self.config, h_BSD, attention_mask, cache, position_ids)
        if cache is not None and self.config.counter is not None:
            counted_B1S1 = h_BSD.new_zeros(len(h_BSD), 1, h_BSD.shape[1], 1)
            cache.update(counted_B1S1, counted_B1S1, self.config.counter)
        rotary = None if self.config.rope_theta is None else rotary_angles(position_ids, self.config, widen(h_BSD).dtype)

        for layer in self.layers:
            mask = masks.get(layer.kind)
            h_BSD = layer(h_BSD, attention_mask=mask, rotary=rotary, cache=cache, position_ids=position_ids, **kwargs)
        if not self.config.is_ngpt:
            h_BSD = self.norm_f(h_BSD)
        return BaseModelOutputWithPast(last_hidden_state=h_BSD, **{CACHE: cache if use_cache else None})

    @staticmethod
    def positions(h_BSD: Tensor, attention_mask: Tensor | dict | None, cache: Cache | None) -> Tensor:
        """[B or 1, S]: tokens of the text before each token. Padding does not count: sqk after the rotation makes positions absolute."""
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -h_BSD.shape[1] :]
        past = 0 if cache is None else cache.get_seq_length()
        return torch.arange(h_BSD.shape[1], device=h_BSD.device)[None] + past


class NGPTForCausalLM(NGPTPreTrainedModel, GenerationMixin):
    """The language model: logits = logit_scale * sz_init * sqrt(D) * (lm_head h). Source: MODEL.md "Logits"."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: NGPTConfig):
        super().__init__(config)
        self._is_stateful = "M" in config.layer_pattern  # Mamba's state cannot be rolled back
        self.model = NGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.has_logit_scale:  # else it was folded into lm_head, whose rows have other norms
            mark(self.lm_head, config, weight=-1)
            self.logit_scale = new_scale(config.vocab_size)
            self.logit_factor = config.sz_init * sqrt(config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids: [B, S]; or inputs_embeds [B, S, D].
            attention_mask: [B, past + S], 0 where a token is padding (left of the text where a cache follows); or masks by kind of layer.
            position_ids: [B, S]; None: counted by the mask, else from the cache's length. Mamba layers see one document a row.
            labels: [B, S], the input_ids again, -100 where there is no loss; they are shifted here.
            use_cache: None: as the config says, but not in training.
            cache, past_key_values: two names of what an earlier call returned; transformers 5.24 and later uses the first.
            logits_to_keep: number of last positions, or their indices, whose logits are computed; 0: all.

        Returns:
            logits [B, S, V] in fp32 at least, and the loss with labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.logits(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BSV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def logits(self, h_BSD: Tensor) -> Tensor:
        """[B, S, V] in fp32 at least, of the stream behind the last layer and norm."""
        logits_BSV = widen(self.lm_head(h_BSD))
        if self.config.has_logit_scale:
            logits_BSV = logits_BSV * (self.logit_scale.to(logits_BSV.dtype) * self.logit_factor)
        return logits_BSV


# `generate` asks for the signature at every token of a class with code of its own: it is read once.
NGPTForCausalLM.forward.__signature__ = inspect.signature(NGPTForCausalLM.forward)
NGPTModel.register_for_auto_class("AutoModel")
NGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
