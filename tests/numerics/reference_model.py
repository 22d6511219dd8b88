"""The dense models (nGPT and its GPT control) in fp64 on plain tensors: the independent truth that the trained models are compared with.

Shapes: B batch, S sequence, D hidden, N query heads, G key/value groups, K head dim, F MLP width, V vocabulary.
Order is [B, S, ...] throughout, projections are `x @ weight.T`, and nothing is fused, cached or in place.

Parameters are a flat dict of tensors. Scales hold their `stored` values; what the model uses is `effective = stored * init / scale`.

    embedding [V, D]   head [V, D] (absent when tied)
    layers.i.attn.q [N*K, D]   .k [G*K, D]   .v [G*K, D]   .proj [D, N*K]
    layers.i.mlp.fc1 [F, D] (swiglu: .gate [F, D] and .up [F, D])   .fc2 [D, F]
    nGPT: layers.i.attn.alpha [D]   .sqk [N*K]   layers.i.mlp.alpha [D]   .suv [F] (swiglu: .suv_gate [F] and .suv_up [F])   sz [V]
    GPT:  layers.i.attn.norm [D]   layers.i.mlp.norm [D]   final_norm [D]
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

EPS = 1e-12


@dataclass(frozen=True)
class ModelSpec:
    """What defines the function of a dense model; `num_layers` counts pairs of attention and MLP."""

    architecture: str  # ngpt | gpt
    num_layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int  # real entries, without padding
    activation: str = "squared_relu"  # squared_relu | swiglu
    tied: bool = False
    rope: bool = True
    rope_base: float = 10_000.0
    fine_grained: bool = True
    alpha_init: float = 0.05
    norm_epsilon: float = 1e-5  # the control's RMSNorm

    def __post_init__(self) -> None:
        assert self.architecture in ("ngpt", "gpt")
        assert self.activation in ("squared_relu", "swiglu")
        assert self.heads % self.groups == 0
        assert self.head_dim % 2 == 0 or not self.rope


def l2_normalize(x: Tensor, dim: int = -1) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim, keepdim=True) + EPS)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def lerp_retract(h: Tensor, b: Tensor, alpha: Tensor) -> Tensor:
    """The residual step: from h towards b, channel by channel, and back to the unit sphere."""
    g = l2_normalize(h)
    return l2_normalize(g + alpha.abs() * (l2_normalize(b) - g))


def rotate(x_BSHK: Tensor, base: float) -> Tensor:
    """Rotary positions: coordinates (i, i + K/2) of position s turn by the angle s * base^(-2i/K)."""
    seq_length, head_dim = x_BSHK.shape[1], x_BSHK.shape[3]
    half = head_dim // 2
    frequency = base ** (-2 * torch.arange(half, dtype=torch.float64, device=x_BSHK.device) / head_dim)
    position = torch.arange(seq_length, dtype=torch.float64, device=x_BSHK.device)
    angle = (position[:, None] * frequency[None, :])[None, :, None, :]
    first, second = x_BSHK[..., :half], x_BSHK[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def scale_init_and_scale(name: str, spec: ModelSpec) -> tuple[float, float]:
    """(init, scale) of the scale parameter called `name`."""
    kind = name.split(".")[-1]
    if kind == "alpha":
        return spec.alpha_init, 1 / sqrt(spec.hidden)
    if kind in ("sqk", "sz"):
        return 1.0, 1 / sqrt(spec.hidden)
    if kind in ("suv", "suv_gate", "suv_up"):
        return 1.0, 1.0
    raise KeyError(name)


def reference_logits(params: dict[str, Tensor], spec: ModelSpec, tokens_BS: Tensor, record: dict[str, Tensor] | None = None) -> Tensor:
    """Logits [B, S, V] in fp64.

    Args:
        params: as in the module docstring, any floating dtype; gradients flow to them.
        spec: the model.
        tokens_BS: token ids, [B, S].
        record: when given, filled with intermediate values (in the graph, so `torch.autograd.grad` reaches them):
            `embedding_out`, `head_in`, `head_out` (before sz), and for each layer `layers.i.` followed by
            `attn.qkv_in`, `attn.q_out`, `attn.k_out`, `attn.v_out`, `attn.proj_in`, `attn.proj_out`, `attn.hidden`,
            `mlp.fc1_in`, `mlp.fc1_out` (swiglu: gate then up), `mlp.fc2_in`, `mlp.fc2_out`, `mlp.hidden`.
            `hidden` is the residual stream after the sub-block. Each is [B, S, features].
    """
    p = {name: value.to(torch.float64) for name, value in params.items()}
    record = {} if record is None else record

    def effective(name: str) -> Tensor:
        init, scale = scale_init_and_scale(name, spec)
        return p[name] * init / scale

    h = record["embedding_out"] = p["embedding"][tokens_BS]
    for i in range(spec.num_layers):
        for block, function in (("attn", _attention), ("mlp", _mlp)):
            prefix = f"layers.{i}.{block}"
            if spec.architecture == "ngpt":
                b = function(p, effective, prefix, spec, h, record)
                h = lerp_retract(h, b, effective(f"{prefix}.alpha"))
            else:
                b = function(p, effective, prefix, spec, rms_norm(h, p[f"{prefix}.norm"], spec.norm_epsilon), record)
                h = h + b
            record[f"{prefix}.hidden"] = h

    head = p["embedding"] if spec.tied else p["head"]
    if spec.architecture == "ngpt":
        record["head_in"] = h
        record["head_out"] = h @ head.T
        return effective("sz") * record["head_out"]
    record["head_in"] = rms_norm(h, p["final_norm"], spec.norm_epsilon)
    record["head_out"] = record["head_in"] @ head.T
    return record["head_out"]


def _attention(p: dict[str, Tensor], effective, prefix: str, spec: ModelSpec, x_BSD: Tensor, record: dict[str, Tensor]) -> Tensor:
    batch, seq_length, _ = x_BSD.shape
    record[f"{prefix}.qkv_in"] = x_BSD
    for name in ("q", "k", "v"):
        record[f"{prefix}.{name}_out"] = x_BSD @ p[f"{prefix}.{name}"].T
    q_BSNK = record[f"{prefix}.q_out"].reshape(batch, seq_length, spec.heads, spec.head_dim)
    k_BSGK = record[f"{prefix}.k_out"].reshape(batch, seq_length, spec.groups, spec.head_dim)
    v_BSGK = record[f"{prefix}.v_out"].reshape(batch, seq_length, spec.groups, spec.head_dim)
    if spec.rope:
        q_BSNK, k_BSGK = rotate(q_BSNK, spec.rope_base), rotate(k_BSGK, spec.rope_base)
    softmax_scale = 1 / sqrt(spec.head_dim)
    if spec.architecture == "ngpt":
        q_BSNK = effective(f"{prefix}.sqk").reshape(spec.heads, spec.head_dim) ** 2 * l2_normalize(q_BSNK)
        k_BSGK = l2_normalize(k_BSGK)
        softmax_scale = sqrt(spec.head_dim)

    head_outputs = []
    future = torch.ones(seq_length, seq_length, dtype=torch.bool, device=x_BSD.device).triu(1)
    for head in range(spec.heads):
        group = head // (spec.heads // spec.groups)  # consecutive query heads share a group
        scores_BST = softmax_scale * q_BSNK[:, :, head] @ k_BSGK[:, :, group].transpose(1, 2)
        weights_BST = scores_BST.masked_fill(future, float("-inf")).softmax(dim=-1)
        head_outputs.append(weights_BST @ v_BSGK[:, :, group])
    o = torch.cat(head_outputs, dim=-1)
    if spec.architecture == "ngpt" and spec.fine_grained:
        o = l2_normalize(o)
    record[f"{prefix}.proj_in"] = o
    record[f"{prefix}.proj_out"] = o @ p[f"{prefix}.proj"].T
    return record[f"{prefix}.proj_out"]


def _mlp(p: dict[str, Tensor], effective, prefix: str, spec: ModelSpec, x_BSD: Tensor, record: dict[str, Tensor]) -> Tensor:
    halves = {"gate": "suv_gate", "up": "suv_up"} if spec.activation == "swiglu" else {"fc1": "suv"}  # weight: its scale
    record[f"{prefix}.fc1_in"] = x_BSD
    outputs = [x_BSD @ p[f"{prefix}.{weight}"].T for weight in halves]
    record[f"{prefix}.fc1_out"] = torch.cat(outputs, dim=-1)
    if spec.architecture == "ngpt":
        outputs = [effective(f"{prefix}.{scale}") * u * sqrt(spec.hidden) for u, scale in zip(outputs, halves.values(), strict=True)]
    if spec.activation == "swiglu":
        gate, up = outputs
        a = gate * torch.sigmoid(gate) * up
    else:
        a = outputs[0].clamp(min=0) ** 2
    if spec.architecture == "ngpt" and spec.fine_grained:
        a = l2_normalize(a)
    record[f"{prefix}.fc2_in"] = a
    record[f"{prefix}.fc2_out"] = a @ p[f"{prefix}.fc2"].T
    return record[f"{prefix}.fc2_out"]


def reference_loss(
    params: dict[str, Tensor],
    spec: ModelSpec,
    tokens_BS: Tensor,
    labels_BS: Tensor,
    loss_mask_BS: Tensor | None = None,
    record: dict[str, Tensor] | None = None,
) -> Tensor:
    """Mean cross entropy in nats over the tokens that `loss_mask_BS` keeps (all of them by default), a fp64 scalar.

    `labels_BS` are the next tokens, already shifted: the label of position s is the token at s + 1.
    """
    log_probability = reference_logits(params, spec, tokens_BS, record).log_softmax(dim=-1)
    loss_BS = -log_probability.gather(-1, labels_BS[..., None])[..., 0]
    if loss_mask_BS is None:
        return loss_BS.mean()
    mask = loss_mask_BS.to(loss_BS.dtype)
    return (loss_BS * mask).sum() / mask.sum()


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model."""
    hidden, ffn, ngpt = spec.hidden, spec.ffn, spec.architecture == "ngpt"
    q_width, kv_width = spec.heads * spec.head_dim, spec.groups * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding": (spec.vocab, hidden)}
    for i in range(spec.num_layers):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        shapes |= {f"{attn}.q": (q_width, hidden), f"{attn}.k": (kv_width, hidden), f"{attn}.v": (kv_width, hidden)}
        shapes |= {f"{attn}.proj": (hidden, q_width), f"{mlp}.fc2": (hidden, ffn)}
        shapes |= {f"{mlp}.{name}": (ffn, hidden) for name in (("gate", "up") if spec.activation == "swiglu" else ("fc1",))}
        if ngpt:
            shapes |= {f"{attn}.alpha": (hidden,), f"{attn}.sqk": (q_width,), f"{mlp}.alpha": (hidden,)}
            shapes |= {f"{mlp}.{name}": (ffn,) for name in (("suv_gate", "suv_up") if spec.activation == "swiglu" else ("suv",))}
        else:
            shapes |= {f"{attn}.norm": (hidden,), f"{mlp}.norm": (hidden,)}
    if not spec.tied:
        shapes["head"] = (spec.vocab, hidden)
    shapes["sz" if ngpt else "final_norm"] = (spec.vocab,) if ngpt else (hidden,)
    return shapes


def random_params(spec: ModelSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Random fp64 parameters: weights of unit norm along D; scales and norm weights at their start times a factor in [0.5, 1.5).

    A quarter of the alphas are negative. Scales are random because a wrong layout of equal values cannot be seen.
    """
    params = {}
    for name, shape in parameter_shapes(spec).items():
        if len(shape) == 2:
            weight = torch.randn(shape, dtype=torch.float64, generator=generator)
            params[name] = l2_normalize(weight, dim=0 if name.endswith((".proj", ".fc2")) else -1)
            continue
        start = 1.0 if name.endswith("norm") else scale_init_and_scale(name, spec)[1]
        params[name] = start * (0.5 + torch.rand(shape, dtype=torch.float64, generator=generator))
        if name.endswith("alpha"):
            params[name] *= torch.where(torch.rand(shape, dtype=torch.float64, generator=generator) < 0.25, -1.0, 1.0)
    return params
