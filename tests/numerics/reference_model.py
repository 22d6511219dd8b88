"""The models (nGPT and its GPT control, dense and hybrid) in fp64 on plain tensors: the truth that the trained models are compared with.

Shapes: B batch, S sequence, D hidden, N query heads, G key/value groups, K head dim, F MLP width, V vocabulary.
Order is [B, S, ...] throughout, projections are `x @ weight.T`, and nothing is fused, cached or in place.

Parameters are a flat dict of tensors. Scales hold their `stored` values; what the model uses is `effective = stored * init / scale`.

    embedding [V, D]   head [V, D] (absent when tied)
    layers.i.attn.q [N*K, D]   .k [G*K, D]   .v [G*K, D]   .proj [D, N*K]
    layers.i.mlp.fc1 [F, D] (gated: .gate [F, D] and .up [F, D])   .fc2 [D, F]
    nGPT: layers.i.attn.alpha [D]   .sqk [N*K]   layers.i.mlp.alpha [D]   .suv [F] (gated: .suv_gate [F] and .suv_up [F])   sz [V]
    GPT:  layers.i.attn.norm [D]   layers.i.mlp.norm [D]   final_norm [D]

With a layer pattern, i counts its symbols: each has one of layers.i.attn (*), .mlp (-), .mamba (M), .moe (E).

    layers.i.mamba.in_proj [2*inner + 2*G*N + H, D], .out_proj [D, inner] and the others of reference_mamba.py, nGPT: .in_scale
    layers.i.moe: see reference_moe.py; both with .alpha or .norm_before [D]

With multi-token prediction, depth d (from 0) has mtp.d.layers.i as above and

    mtp.d.join [D, 2*D]   GPT: .embedding_norm [D]   .hidden_norm [D]   .norm [D]
"""

from dataclasses import dataclass
from math import sqrt

import torch
from reference_activations import ACTIVATIONS
from reference_mamba import MambaSpec, between_projections, grouped_rms_norm
from reference_moe import MoeSpec, moe, moe_shapes, router_factor
from torch import Tensor

EPS = 1e-12
KINDS = {"*": "attn", "-": "mlp", "M": "mamba", "E": "moe"}


@dataclass(frozen=True)
class ModelSpec:
    """What defines the function of a model; without a pattern, `num_layers` counts pairs of attention and MLP."""

    architecture: str  # ngpt | gpt
    num_layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int  # real entries, without padding
    activation: str = "squared_relu"
    tied: bool = False
    rope: bool = True
    rope_base: float = 10_000.0
    fine_grained: bool = True
    alpha_init: float = 0.05
    norm_epsilon: float = 1e-5  # the control's RMSNorm
    pattern: str | None = None  # of * - M E
    moe: MoeSpec | None = None
    mamba: MambaSpec | None = None
    conv_kernel: int = 4
    gated_norm: bool = False  # nGPT: with Mamba's own norm
    depths: int = 0  # of multi-token prediction
    depth_pattern: str = ""  # layers of each, of * - M E
    depth_coeff: float = 0.1  # of the mean of their losses
    sz_init: float = 1.0

    def __post_init__(self) -> None:
        assert self.architecture in ("ngpt", "gpt")
        assert self.activation in ACTIVATIONS
        assert self.heads % self.groups == 0
        assert self.head_dim % 2 == 0 or not self.rope

    def sub_blocks(self) -> list[tuple[str, str]]:
        """(prefix of its parameters, kind) of each sub-block in order."""
        if self.pattern is None:
            return [(f"layers.{i}.{kind}", kind) for i in range(self.num_layers) for kind in ("attn", "mlp")]
        return [(f"layers.{i}.{KINDS[symbol]}", KINDS[symbol]) for i, symbol in enumerate(self.pattern)]

    def depth_blocks(self, depth: int) -> list[tuple[str, str]]:
        """The same for a prediction depth, counted from 0."""
        return [(f"mtp.{depth}.layers.{i}.{KINDS[symbol]}", KINDS[symbol]) for i, symbol in enumerate(self.depth_pattern)]

    @property
    def has_mixer_norm(self) -> bool:
        return self.architecture == "gpt" or self.gated_norm


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
    if kind == "sz":
        return spec.sz_init, 1 / sqrt(spec.hidden)
    if kind == "sqk":
        return 1.0, 1 / sqrt(spec.hidden)
    if kind in ("suv", "suv_gate", "suv_up", "in_scale"):
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
            `mlp.fc1_in`, `mlp.fc1_out` (gated: gate then up), `mlp.fc2_in`, `mlp.fc2_out`, `mlp.hidden`.
            `mamba.out_proj_in`, `mamba.out_proj_out`, `moe.out`, `moe.loads` [B, E] and the scalar `moe.aux_loss` where there are such.
            `hidden` is the residual stream after the sub-block. Each is [B, S, features].
    """
    p = {name: value.to(torch.float64) for name, value in params.items()}
    record = {} if record is None else record

    record["embedding_out"] = p["embedding"][tokens_BS]
    h = _sub_blocks(p, spec, spec.sub_blocks(), record["embedding_out"], record)
    record["head_in"] = h if spec.architecture == "ngpt" else rms_norm(h, p["final_norm"], spec.norm_epsilon)
    record["head_out"] = record["head_in"] @ _head(p, spec).T
    return _scaled_logits(p, spec, record["head_out"])


def reference_prediction_loss(
    params: dict[str, Tensor],
    spec: ModelSpec,
    tokens_BS: Tensor,
    labels_BS: Tensor,
    record: dict[str, Tensor],
    loss_mask_BS: Tensor | None = None,
) -> Tensor:
    """What multi-token prediction adds to the loss: its coefficient times the mean of the depths' mean losses, a fp64 scalar.

    At position s, depth d (from 1) joins the embedding of token s + d with the state of the depth before, and predicts token s + d + 1.
    Positions beyond the sequence hold token 0 and count in no loss.

    Args:
        record: of `reference_logits`, whose `head_in` the first depth reads. Filled with the same values for the depths' layers, and
            with `mtp.d.loss` and `mtp.d.logits`.
    """
    p = {name: value.to(torch.float64) for name, value in params.items()}
    mask_BS = torch.ones_like(labels_BS) if loss_mask_BS is None else loss_mask_BS
    h, total = record["head_in"], torch.zeros((), dtype=torch.float64)
    for depth in range(spec.depths):
        ahead = [torch.nn.functional.pad(x[:, depth + 1 :], (0, depth + 1)) for x in (tokens_BS, labels_BS, mask_BS)]
        h = _prediction_depth(p, spec, depth, p["embedding"][ahead[0]], h, record)
        logits = record[f"mtp.{depth}.logits"] = _scaled_logits(p, spec, h @ _head(p, spec).T)
        record[f"mtp.{depth}.loss"] = mean_cross_entropy(logits, ahead[1], ahead[2])
        total = total + record[f"mtp.{depth}.loss"]
    return spec.depth_coeff * total / max(spec.depths, 1)


def _prediction_depth(p: dict[str, Tensor], spec: ModelSpec, depth: int, embedded: Tensor, h: Tensor, record: dict[str, Tensor]) -> Tensor:
    prefix, blocks = f"mtp.{depth}", spec.depth_blocks(depth)
    if spec.architecture == "ngpt":
        return _sub_blocks(p, spec, blocks, l2_normalize(torch.cat([embedded, h], -1) @ p[f"{prefix}.join"].T), record)
    embedded, h = (rms_norm(x, p[f"{prefix}.{name}_norm"], spec.norm_epsilon) for x, name in ((embedded, "embedding"), (h, "hidden")))
    h = _sub_blocks(p, spec, blocks, torch.cat([embedded, h], -1) @ p[f"{prefix}.join"].T, record)
    return rms_norm(h, p[f"{prefix}.norm"], spec.norm_epsilon)


def _sub_blocks(p: dict[str, Tensor], spec: ModelSpec, blocks: list[tuple[str, str]], h: Tensor, record: dict[str, Tensor]) -> Tensor:
    """The residual stream after the blocks."""

    def effective(name: str) -> Tensor:
        return effective_scale(p, spec, name)

    functions = {"attn": _attention, "mlp": _mlp, "mamba": _mamba, "moe": _moe}
    for prefix, kind in blocks:
        if spec.architecture == "ngpt":
            b = functions[kind](p, effective, prefix, spec, h, record)
            h = lerp_retract(h, b, effective(f"{prefix}.alpha"))
        else:
            b = functions[kind](p, effective, prefix, spec, rms_norm(h, p[norm_name(prefix, kind)], spec.norm_epsilon), record)
            h = h + b
        record[f"{prefix}.hidden"] = h
    return h


def effective_scale(p: dict[str, Tensor], spec: ModelSpec, name: str) -> Tensor:
    init, scale = scale_init_and_scale(name, spec)
    return p[name] * init / scale


def _head(p: dict[str, Tensor], spec: ModelSpec) -> Tensor:
    return p["embedding"] if spec.tied else p["head"]


def _scaled_logits(p: dict[str, Tensor], spec: ModelSpec, head_out: Tensor) -> Tensor:
    return effective_scale(p, spec, "sz") * head_out if spec.architecture == "ngpt" else head_out


def norm_name(prefix: str, kind: str) -> str:
    """The control's norm in front of a sub-block. A Mamba mixer has another one, called norm, inside."""
    return f"{prefix}.norm_before" if kind in ("mamba", "moe") else f"{prefix}.norm"


def _mamba(p: dict[str, Tensor], effective, prefix: str, spec: ModelSpec, x_BSD: Tensor, record: dict[str, Tensor]) -> Tensor:
    own = {name.removeprefix(f"{prefix}."): value for name, value in p.items() if name.startswith(f"{prefix}.")}
    zxBCdt = x_BSD @ own["in_proj"].T
    if spec.architecture == "ngpt":
        zxBCdt = effective(f"{prefix}.in_scale") * sqrt(spec.hidden) * zxBCdt
    y = between_projections(own, spec.mamba, zxBCdt)
    if spec.has_mixer_norm:
        y = grouped_rms_norm(y, own["norm"], spec.mamba.groups, spec.mamba.norm_epsilon)
    if spec.architecture == "ngpt" and spec.fine_grained:
        y = l2_normalize(y)
    record[f"{prefix}.out_proj_in"] = y
    record[f"{prefix}.out_proj_out"] = y @ own["out_proj"].T
    return record[f"{prefix}.out_proj_out"]


def _moe(p: dict[str, Tensor], effective, prefix: str, spec: ModelSpec, x_BSD: Tensor, record: dict[str, Tensor]) -> Tensor:
    def expert(name: str, x_D: Tensor) -> Tensor:
        suv_of = prefix if spec.moe.shared_suv and ".experts." in name else name
        return _feed_forward(p, effective, name, suv_of, spec, x_D, {})

    factor = router_factor(spec.moe, spec.hidden, spec.architecture == "ngpt")
    record[f"{prefix}.out"], record[f"{prefix}.aux_loss"], record[f"{prefix}.loads"] = moe(p, prefix, spec.moe, factor, expert, x_BSD)
    return record[f"{prefix}.out"]


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
    return _feed_forward(p, effective, prefix, prefix, spec, x_BSD, record)


def _feed_forward(
    p: dict[str, Tensor], effective, prefix: str, suv_of: str, spec: ModelSpec, x: Tensor, record: dict[str, Tensor]
) -> Tensor:
    """[..., D] to [..., D]; the scales are found below `suv_of`."""
    activation = ACTIVATIONS[spec.activation]
    halves = {"gate": "suv_gate", "up": "suv_up"} if activation.gated else {"fc1": "suv"}  # weight: its scale
    record[f"{prefix}.fc1_in"] = x
    outputs = [x @ p[f"{prefix}.{weight}"].T for weight in halves]
    record[f"{prefix}.fc1_out"] = torch.cat(outputs, dim=-1)
    if spec.architecture == "ngpt":
        outputs = [effective(f"{suv_of}.{scale}") * u * sqrt(spec.hidden) for u, scale in zip(outputs, halves.values(), strict=True)]
    a = activation.f(outputs[0])
    if activation.gated:
        a = a * outputs[1]
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
    mask = torch.ones_like(labels_BS) if loss_mask_BS is None else loss_mask_BS
    return mean_cross_entropy(reference_logits(params, spec, tokens_BS, record), labels_BS, mask)


def mean_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """In nats, over the tokens that the mask keeps."""
    loss_BS = -logits_BSV.log_softmax(dim=-1).gather(-1, labels_BS[..., None])[..., 0]
    mask = mask_BS.to(loss_BS.dtype)
    return (loss_BS * mask).sum() / mask.sum()


def auxiliary_loss(record: dict[str, Tensor]) -> Tensor:
    """Sum of the balancing losses that a forward pass has recorded."""
    return sum((value for name, value in record.items() if name.endswith(".aux_loss")), torch.zeros((), dtype=torch.float64))


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model."""
    ngpt = spec.architecture == "ngpt"
    shapes: dict[str, tuple[int, ...]] = {"embedding": (spec.vocab, spec.hidden)}
    for prefix, kind in [*spec.sub_blocks(), *(block for depth in range(spec.depths) for block in spec.depth_blocks(depth))]:
        shapes |= {f"{prefix}.{name}": shape for name, shape in _block_shapes(spec, kind).items()}
        shapes[f"{prefix}.alpha" if ngpt else norm_name(prefix, kind)] = (spec.hidden,)
    for depth in range(spec.depths):
        shapes[f"mtp.{depth}.join"] = (spec.hidden, 2 * spec.hidden)
        shapes |= {} if ngpt else {f"mtp.{depth}.{name}": (spec.hidden,) for name in ("embedding_norm", "hidden_norm", "norm")}
    if not spec.tied:
        shapes["head"] = (spec.vocab, spec.hidden)
    shapes["sz" if ngpt else "final_norm"] = (spec.vocab,) if ngpt else (spec.hidden,)
    return shapes


def _block_shapes(spec: ModelSpec, kind: str) -> dict[str, tuple[int, ...]]:
    hidden, ffn, ngpt, gated = spec.hidden, spec.ffn, spec.architecture == "ngpt", ACTIVATIONS[spec.activation].gated
    if kind == "attn":
        queries, keys = spec.heads * spec.head_dim, spec.groups * spec.head_dim
        shapes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "proj": (hidden, queries)}
        return shapes | ({"sqk": (queries,)} if ngpt else {})
    if kind == "mlp":
        shapes = {name: (ffn, hidden) for name in (("gate", "up") if gated else ("fc1",))} | {"fc2": (hidden, ffn)}
        return shapes | ({name: (ffn,) for name in (("suv_gate", "suv_up") if gated else ("suv",))} if ngpt else {})
    if kind == "moe":
        return moe_shapes(spec.moe, hidden, gated, ngpt)
    heads, inner = spec.mamba.heads, spec.mamba.heads * spec.mamba.head_dim
    features = inner + 2 * spec.mamba.groups * spec.mamba.state
    shapes = {"in_proj": (inner + features + heads, hidden), "out_proj": (hidden, inner), "conv_weight": (features, spec.conv_kernel)}
    shapes |= {"conv_bias": (features,), "dt_bias": (heads,), "A_log": (heads,), "D": (heads,)}
    shapes |= {"in_scale": (inner + features + heads,)} if ngpt else {}
    return shapes | ({"norm": (inner,)} if spec.has_mixer_norm else {})


def random_params(spec: ModelSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Random fp64 parameters: weights of unit norm along D; scales and norm weights at their start times a factor in [0.5, 1.5).

    A quarter of the alphas are negative. Scales are random because a wrong layout of equal values cannot be seen.
    """
    params = {}
    for name, shape in parameter_shapes(spec).items():
        if len(shape) == 2:
            weight = torch.randn(shape, dtype=torch.float64, generator=generator)
            params[name] = l2_normalize(weight, dim=0 if name.endswith((".proj", ".fc2", ".out_proj", ".join")) else -1)
            continue
        if name.endswith((".bias", ".conv_bias", ".dt_bias", ".A_log", ".D")):
            params[name] = 0.3 * torch.randn(shape, dtype=torch.float64, generator=generator)
            continue
        start = 1.0 if name.endswith(("norm", "norm_before")) else scale_init_and_scale(name, spec)[1]
        params[name] = start * (0.5 + torch.rand(shape, dtype=torch.float64, generator=generator))
        if name.endswith("alpha"):
            params[name] *= torch.where(torch.rand(shape, dtype=torch.float64, generator=generator) < 0.25, -1.0, 1.0)
    return params
