"""Mixture of experts in fp64, token by token: router, routed experts, shared expert and the loss that balances them.

Shapes: B batch, S sequence, D hidden, E experts, F expert width. Parameters below a layer's prefix, e the expert's number:

    router [E, D]   experts.e.fc1 [F, D] (gated: .gate and .up)   experts.e.fc2 [D, F]   shared.fc1, shared.fc2 where there is one
    nGPT: experts.e.suv [F] and shared.suv (gated: .suv_gate and .suv_up); moe_suv=shared: suv, of all experts
    bias [E]: added to the scores for the selection only, not trained
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class MoeSpec:
    """What defines the function of the expert layers."""

    experts: int
    top_k: int
    ffn: int
    shared_ffn: int = 0
    score: str = "sigmoid"  # sigmoid | softmax
    scaling: float = 1.0
    scaled_input: bool = True  # nGPT: the router reads sqrt(D) * h
    shared_suv: bool = False
    aux_loss: str = "none"  # none | seq_aux_loss | aux_loss
    aux_loss_coeff: float = 0.0


def moe(
    p: dict[str, Tensor], prefix: str, spec: MoeSpec, router_factor: float, expert: Callable[[str, Tensor], Tensor], x_BSD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output [B, S, D], its auxiliary loss and how many tokens each expert got, [B, E].

    Args:
        router_factor: the router reads router_factor * x.
        expert: (prefix of an expert's parameters, its token [D]) -> its output [D].
    """
    batch, length, _ = x_BSD.shape
    rows, loads = [], torch.zeros(batch, spec.experts, dtype=torch.float64)
    for row in range(batch):
        outputs = []
        for token in range(length):
            x_D = x_BSD[row, token]
            logits_E = p[f"{prefix}.router"] @ (router_factor * x_D)
            y_D = torch.zeros_like(x_D)
            for number, weight in selected(logits_E, p[f"{prefix}.bias"], spec):
                y_D = y_D + weight * expert(f"{prefix}.experts.{number}", x_D)
                loads[row, number] += 1
            if spec.shared_ffn:
                y_D = y_D + expert(f"{prefix}.shared", x_D)
            outputs.append(y_D)
        rows.append(torch.stack(outputs))
    return torch.stack(rows), _balance(router_factor * x_BSD @ p[f"{prefix}.router"].T, spec), loads


def selected(logits_E: Tensor, bias_E: Tensor, spec: MoeSpec) -> list[tuple[int, Tensor]]:
    """(expert, weight of its output) for the chosen ones: the k with the largest score + bias."""
    scores_E = 1 / (1 + torch.exp(-logits_E)) if spec.score == "sigmoid" else torch.exp(logits_E) / torch.exp(logits_E).sum()
    order = sorted(range(spec.experts), key=lambda number: -(scores_E[number] + bias_E[number]).item())
    chosen = order[: spec.top_k]
    total = sum(scores_E[number] for number in chosen) + 1e-20 if spec.top_k > 1 else 1.0
    return [(number, spec.scaling * scores_E[number] / total) for number in chosen]


def _balance(logits_BSE: Tensor, spec: MoeSpec) -> Tensor:
    """coefficient * E * sum over experts of (share of the selections) * (mean normalised score).

    Within each sequence and averaged over them (seq_aux_loss), or within the whole micro-batch. The selection here ignores the bias.
    """
    if spec.aux_loss == "none":
        return torch.zeros((), dtype=torch.float64)
    scores = torch.sigmoid(logits_BSE) if spec.score == "sigmoid" else torch.exp(logits_BSE)
    scores = scores / scores.sum(-1, keepdim=True)
    groups = scores if spec.aux_loss == "seq_aux_loss" else scores.reshape(1, -1, spec.experts)
    losses = []
    for scores_TE in groups:
        counts_E = torch.zeros(spec.experts, dtype=torch.float64)
        for token in scores_TE:
            for number in sorted(range(spec.experts), key=lambda number: -token[number].item())[: spec.top_k]:
                counts_E[number] += 1
        share_E = counts_E / (spec.top_k * scores_TE.shape[0])
        losses.append(spec.experts * (share_E * scores_TE.mean(0)).sum())
    return spec.aux_loss_coeff * sum(losses) / len(losses)


def moe_shapes(spec: MoeSpec, hidden: int, gated: bool, ngpt: bool) -> dict[str, tuple[int, ...]]:
    """Name below the layer's prefix and shape of every parameter, the bias among them."""
    shapes: dict[str, tuple[int, ...]] = {"router": (spec.experts, hidden), "bias": (spec.experts,)}
    suvs = ("suv_gate", "suv_up") if gated else ("suv",)
    experts = [(f"experts.{number}", spec.ffn) for number in range(spec.experts)] + [("shared", spec.shared_ffn)] * bool(spec.shared_ffn)
    for name, ffn in experts:
        shapes |= {f"{name}.{weight}": (ffn, hidden) for weight in (("gate", "up") if gated else ("fc1",))}
        shapes[f"{name}.fc2"] = (hidden, ffn)
        if ngpt and (name == "shared" or not spec.shared_suv):
            shapes |= {f"{name}.{suv}": (ffn,) for suv in suvs}
    if ngpt and spec.shared_suv:
        shapes |= {suv: (spec.ffn,) for suv in suvs}
    return shapes


def router_factor(spec: MoeSpec, hidden: int, ngpt: bool) -> float:
    """What the router's input is multiplied by."""
    return sqrt(hidden) if ngpt and spec.scaled_input else 1.0
