"""Finds a step whose loss or gradients are not finite on some rank, before the optimizer moves. All ranks come to the same result.

Nothing waits for the device until the gradients are reduced: losses stay where they are computed, and one all-reduce of three numbers
tells every rank whether any of them, or the norm that the optimizer clips by, is bad. Only then do the ranks look through their gradients
and tell each other where.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from torch import Tensor

from ngpt.progress import in_ranges

_KINDS = ("finite", "nan", "infinite")


class GradientParts(NamedTuple):
    """One rank's gradients after their reduction."""

    own: list[Tensor]  # as this rank computed them
    reduced: list[Tensor]


class Finding(NamedTuple):
    """What one rank saw."""

    rank: int
    loss: int  # index into _KINDS
    microbatch: int  # of the first bad loss, from 1
    own: int  # index into _KINDS, of `GradientParts.own`
    reduced: int  # index into _KINDS, of `GradientParts.reduced`
    first_sample: int  # of that micro-batch in the run's order of samples
    samples: int


class StepHealth(NamedTuple):
    """One step over all ranks."""

    loss: float | None  # mean over its tokens; None where no rank has seen one
    findings: list[Finding]  # of all ranks, where a loss or the gradient's norm is not finite


class NonFiniteMonitor:
    """Collects this rank's losses of a step, and judges the step together with the other ranks."""

    def __init__(self, rank: int):
        self.rank = rank
        self.losses: list[Tensor] = []

    def add_loss(self, sum_and_tokens: Tensor) -> None:
        """Of one micro-batch on this rank: [sum of the token losses, tokens]."""
        self.losses.append(sum_and_tokens.detach())

    def judge(
        self, samples: Sequence[tuple[int, int]], gradient_norm: Tensor | float, gradients: Callable[[], GradientParts]
    ) -> StepHealth:
        """The judged step, the same on every rank. The next step starts empty.

        Args:
            samples: (first, number) of each of this rank's micro-batches, in the run's order of samples.
            gradient_norm: of the reduced gradients, as the optimizer clips by it.
            gradients: gives this rank's, where something is not finite.

        Parallelism: one world all-reduce, and one all-gather where something is not finite.
        """
        device = torch.cuda.current_device()
        losses = torch.stack(self.losses).double() if self.losses else torch.zeros(0, 2, dtype=torch.float64, device=device)
        norm = torch.as_tensor(gradient_norm, dtype=torch.float64, device=device).reshape(())
        self.losses = []
        bad_losses = ~losses[:, 0].isfinite()
        finite = torch.where(bad_losses[:, None], 0.0, losses).sum(0)
        summed = torch.stack([(bad_losses.any() | ~norm.isfinite()).double(), *finite])
        dist.all_reduce(summed)
        bad_ranks, loss, tokens = summed.tolist()
        findings = self._gather(losses[:, 0], samples, gradients()) if bad_ranks else []
        return StepHealth(loss / tokens if tokens else None, findings)

    def _gather(self, losses: Tensor, samples: Sequence[tuple[int, int]], gradients: GradientParts) -> list[Finding]:
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        place = samples[bad[0]] if bad and bad[0] < len(samples) else (0, 0)
        own, reduced = (_kind(torch.stack([part.norm() for part in parts])) if parts else 0 for parts in gradients)
        mine = Finding(self.rank, _kind(losses), bad[0] + 1 if bad else 0, own, reduced, *place)
        everyone = torch.zeros(dist.get_world_size(), len(mine), dtype=torch.int64, device=losses.device)
        dist.all_gather_into_tensor(everyone, torch.tensor([mine], dtype=torch.int64, device=losses.device))
        return [Finding(*row) for row in everyone.tolist()]


def gradient_parts(chunks: Sequence) -> GradientParts:
    """The parts of this rank's gradient buffers. A reduce-scatter writes only this rank's shard of a bucket, an all-reduce all of it."""
    parts = GradientParts([], [])
    for group in (group for chunk in chunks for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups):
        scatters = group.ddp_config.use_distributed_optimizer
        replicas = group.intra_distributed_optimizer_instance_group if scatters else group.data_parallel_group
        for bucket in group.buckets:
            shards = shard_buffer(bucket.grad_data, replicas.size()) if scatters else [bucket.grad_data]
            if replicas.size() > 1:
                parts.reduced.append(shards.pop(replicas.rank() if scatters else 0))
            parts.own.extend(shards)
    return parts


def _kind(values: Tensor) -> int:
    return 1 if values.isnan().any() else 2 if values.isinf().any() else 0


def describe_findings(findings: Sequence[Finding]) -> str:
    """For instance `the loss is nan on rank 1, micro-batch 2 (samples 44-45)`; ranks whose loss is bad are told by it.

    What shows only once the gradients are reduced either came from the rank whose shard has it, or arose in the sum.
    """
    parts = [
        f"the loss is {_KINDS[finding.loss]} on rank {finding.rank}, micro-batch {finding.microbatch} ("
        f"{in_samples(finding.first_sample, finding.samples)})"
        for finding in findings
        if finding.loss
    ]
    if len(parts) > 4:
        parts = [*parts[:3], f"and so on {len(parts) - 3} more ranks"]
    parts += _gradients([(finding.rank, finding.own) for finding in findings if not finding.loss], "before")
    parts = parts or _gradients([(finding.rank, finding.reduced) for finding in findings], "after")
    return "; ".join(parts) or "the norm of the gradient is not finite, though all parts of it are"


def _gradients(kinds: Sequence[tuple[int, int]], when: str) -> list[str]:
    bad = {kind: [rank for rank, other in kinds if other == kind] for kind in (1, 2)}
    return [f"the gradient is {_KINDS[kind]} on {in_ranges(ranks)} {when} it is reduced" for kind, ranks in bad.items() if ranks]


def in_samples(first: int, number: int) -> str:
    """`sample 4` or `samples 4-7`, counted from 0 in the order in which the run takes them."""
    return f"sample {first}" if number == 1 else f"samples {first}-{first + number - 1}"
