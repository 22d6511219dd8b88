"""What is said of a step that is not finite: who brought it where that can be seen, and where it shows otherwise."""

from types import SimpleNamespace

import pytest
import torch

from megatron_ext.training.nonfinite import Finding, describe_findings, gradient_parts
from megatron_ext.training.step_policy import StepPolicy
from ngpt.config import compose

FINE, NAN, INFINITE = 0, 1, 2


def seen(rank: int, loss: int = FINE, own: int = FINE, reduced: int = FINE) -> Finding:
    return Finding(rank, loss, microbatch=2, own=own, reduced=reduced, first_sample=8, samples=2)


@pytest.mark.parametrize(
    ("findings", "words"),
    [
        ([seen(0, reduced=NAN), seen(1, NAN, NAN, NAN)], "the loss is nan on rank 1, micro-batch 2 (samples 8-9)"),
        ([seen(0, own=NAN), seen(1, reduced=NAN), seen(2)], "the gradient is nan on rank 0 before it is reduced"),
        ([seen(0), seen(1), seen(2, reduced=INFINITE)], "the gradient is infinite on rank 2 after it is reduced"),
        ([seen(0), seen(1)], "the norm of the gradient is not finite, though all parts of it are"),
    ],
    ids=["loss", "own", "own shard", "sum of squares"],
)
def test_the_most_that_is_known_is_told(findings, words):
    assert describe_findings(findings) == words


class Group:
    def __init__(self, size: int, rank: int):
        self.size, self.rank = lambda: size, lambda: rank


def parts_of(size: int, rank: int, scatters: bool) -> tuple[list[list[float]], list[list[float]]]:
    config, key = SimpleNamespace(use_distributed_optimizer=scatters), "data_parallel_group"
    key = "intra_distributed_optimizer_instance_group" if scatters else key
    group = SimpleNamespace(ddp_config=config, buckets=[SimpleNamespace(grad_data=torch.arange(6.0))], **{key: Group(size, rank)})
    chunk = SimpleNamespace(bucket_groups=[], expert_parallel_bucket_groups=[group])
    own, reduced = gradient_parts([chunk])
    return [part.tolist() for part in own], [part.tolist() for part in reduced]


def test_a_shard_is_reduced_and_the_rest_is_as_the_rank_computed_it():
    assert parts_of(3, 1, scatters=True) == ([[0, 1], [4, 5]], [[2, 3]])
    assert parts_of(2, 1, scatters=False) == ([], [[0, 1, 2, 3, 4, 5]])
    assert parts_of(1, 0, scatters=True) == parts_of(1, 0, scatters=False) == ([[0, 1, 2, 3, 4, 5]], [])


def test_the_norm_is_taken_once_and_judged_before_it_clips(monkeypatch):
    seen = []
    norms = iter([1.5, float("inf")])
    optimizer = SimpleNamespace(prepare_grads=lambda: seen.append("prepared") or False, get_grad_norm=lambda: next(norms))
    policy = StepPolicy(compose(["experiment=ngpt_tiny"]), 0, print, lambda: None)
    monkeypatch.setattr(policy, "_refuses_step", lambda: seen.append(policy.gradient_norm) or policy.gradient_norm > 2)
    policy.attach_optimizer(optimizer)
    assert (optimizer.prepare_grads(), optimizer.get_grad_norm(), optimizer.get_grad_norm()) == (False, 1.5, 1.5)
    assert optimizer.prepare_grads() is True
    assert seen == ["prepared", 1.5, "prepared", float("inf")]
