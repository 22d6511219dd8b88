"""Finds a step whose loss or gradients are not finite on any rank, before the optimizer moves, the same on every rank.

Nothing waits for the device until the gradients are reduced: losses and norms stay where they are computed, and one all-reduce of three
numbers tells every rank whether any of them is bad. Only then the ranks tell each other where.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ngpt.progress import in_ranges

_KINDS = ("finite", "nan", "infinite")


class Finding(NamedTuple):
    """What one rank saw."""

    rank: int
    loss: int  # index into _KINDS
    microbatch: int  # of the first bad loss, from 1
    gradient: int  # index into _KINDS, of this rank's part before it was reduced
    first_sample: int  # of that micro-batch in the run's order of samples
    samples: int


class StepHealth(NamedTuple):
    """One step over all ranks."""

    loss: float | None  # mean over its tokens; None where no rank has seen one
    findings: list[Finding]  # of the ranks that saw something that is not finite


class NonFiniteMonitor:
    """Collects this rank's losses and gradient norms of a step, and judges the step together with the other ranks."""

    def __init__(self, rank: int):
        self.rank = rank
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def add_loss(self, sum_and_tokens: Tensor) -> None:
        """Of one micro-batch on this rank: [sum of the token losses, tokens]."""
        self.losses.append(sum_and_tokens.detach())

    def add_gradient_norm(self, norm: Tensor) -> None:
        """Of a part of this rank's gradients, before they are reduced."""
        self.norms.append(norm.detach())

    def judge(self, samples: Sequence[tuple[int, int]]) -> StepHealth:
        """The step, the same on every rank; the next one starts empty.

        Args:
            samples: (first, number) of each of this rank's micro-batches, in the run's order of samples.

        Parallelism: one world all-reduce, and one all-gather where something is not finite.
        """
        device = torch.cuda.current_device()
        losses = torch.stack(self.losses).double() if self.losses else torch.zeros(0, 2, dtype=torch.float64, device=device)
        norms = torch.stack([norm.double().reshape(()) for norm in self.norms]) if self.norms else losses.new_zeros(0)
        self.losses, self.norms = [], []
        bad_losses, bad_norms = ~losses[:, 0].isfinite(), ~norms.isfinite()
        finite = torch.where(bad_losses[:, None], 0.0, losses).sum(0)
        summed = torch.stack([(bad_losses.any() | bad_norms.any()).double(), *finite])
        dist.all_reduce(summed)
        bad_ranks, loss, tokens = summed.tolist()
        findings = self._gather(losses[:, 0], norms, samples) if bad_ranks else []
        return StepHealth(loss / tokens if tokens else None, findings)

    def _gather(self, losses: Tensor, norms: Tensor, samples: Sequence[tuple[int, int]]) -> list[Finding]:
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        place = samples[bad[0]] if bad and bad[0] < len(samples) else (0, 0)
        own = [self.rank, _kind(losses), bad[0] + 1 if bad else 0, _kind(norms), *place]
        everyone = torch.zeros(dist.get_world_size(), len(own), dtype=torch.int64, device=norms.device)
        dist.all_gather_into_tensor(everyone, torch.tensor([own], dtype=torch.int64, device=norms.device))
        return [finding for row in everyone.tolist() if (finding := Finding(*row)).loss or finding.gradient]


def _kind(values: Tensor) -> int:
    return 1 if values.isnan().any() else 2 if values.isinf().any() else 0


def describe_findings(findings: Sequence[Finding]) -> str:
    """For instance `the loss is nan on rank 1, micro-batch 2 (samples 44-45)`; ranks whose loss is bad are told by it."""
    parts = [
        f"the loss is {_KINDS[finding.loss]} on rank {finding.rank}, micro-batch {finding.microbatch} ("
        f"{in_samples(finding.first_sample, finding.samples)})"
        for finding in findings
        if finding.loss
    ]
    if len(parts) > 4:
        parts = [*parts[:3], f"and so on {len(parts) - 3} more ranks"]
    for kind in (1, 2):
        ranks = [finding.rank for finding in findings if finding.gradient == kind and not finding.loss]
        if ranks:
            parts.append(f"the gradient is {_KINDS[kind]} on {in_ranges(ranks)} before it is reduced")
    return "; ".join(parts)


def in_samples(first: int, number: int) -> str:
    """`sample 4` or `samples 4-7`, counted from 0 in the order in which the run takes them."""
    return f"sample {first}" if number == 1 else f"samples {first}-{first + number - 1}"
