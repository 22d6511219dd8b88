"""What happens to a step that must not be trained on: `train.on_nonfinite` and `train.on_spike`, the same on every rank.

Megatron's optimizers ask `prepare_grads` whether to leave a step out; that is where a step is judged, after its gradients are reduced and
before anything is clipped or moved.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args

from megatron_ext.training.collective import from_rank_0
from megatron_ext.training.nonfinite import NonFiniteMonitor, describe_findings, gradient_parts, in_samples
from ngpt.config import Config, ConfigError
from ngpt.config.checkpoints import newest_step
from ngpt.rollbacks import RefusedStep, RolledBack, read_rollbacks, record_rollback, refusal
from ngpt.spikes import SpikeDetector

MOST_SKIPPED_IN_A_ROW = 10  # after so many in a row the batch is not to blame


class StepPolicy:
    """Judges this rank's steps together with the other ranks.

    Args:
        say: Prints a line for a person.
        on_skipped: Called on every rank for a step that is left out, in place of what follows an optimizer's step.
    """

    def __init__(self, cfg: Config, rank: int, say: Callable[[str], None], on_skipped: Callable[[], None]):
        self.cfg, self.say, self.on_skipped = cfg, say, on_skipped
        self.monitor = NonFiniteMonitor(rank)
        self.spikes = SpikeDetector(cfg.train.spike_threshold)
        self.skipped_in_a_row = 0
        self.biases: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attach(self, chunks: list) -> None:
        """Called with the wrapped model chunks, once Megatron is initialized."""
        self.chunks = chunks
        skips = "skip" in (self.cfg.train.on_nonfinite, self.cfg.train.on_spike)
        modules = (module for chunk in chunks for module in chunk.modules()) if skips else ()
        self.routers = [module for module in modules if getattr(module, "expert_bias", None) is not None]

    def attach_optimizer(self, optimizer: Any) -> None:
        """Called with Megatron's optimizer, a `ChainedOptimizer`: other kinds take their norm elsewhere."""
        prepare_upstream, measure_upstream = optimizer.prepare_grads, optimizer.get_grad_norm

        def prepare_grads() -> bool:
            found = prepare_upstream()
            self.gradient_norm = measure_upstream()
            return self._refuses_step() or found

        # A step prepares its gradients, then asks for their norm to clip by it.
        optimizer.prepare_grads, optimizer.get_grad_norm = prepare_grads, lambda: self.gradient_norm

    def before_reduction(self) -> None:
        """The routers' biases move with the reduction: a step that is left out moves them back."""
        self.biases = [(router.expert_bias, router.expert_bias.clone()) for router in self.routers]

    def _refuses_step(self) -> bool:
        health = self.monitor.judge(_samples_of_rank(), self.gradient_norm, lambda: gradient_parts(self.chunks))
        spike = self.spikes.judge(health.loss) if health.loss is not None else None
        if health.findings:
            return self._refuse(self.cfg.train.on_nonfinite, "train.on_nonfinite", describe_findings(health.findings))
        if spike is not None and self.cfg.train.on_spike != "note":
            return self._refuse(self.cfg.train.on_spike, "train.on_spike", str(spike))
        if spike is not None:
            self.say(f"note: {_step_and_samples()}: {spike}")
        if health.loss is not None:
            self.spikes.keep(health.loss)
        self.skipped_in_a_row = 0
        return False

    def _refuse(self, policy: str, key: str, why: str) -> bool:
        why = f"{_step_and_samples()}: {why}"
        if policy == "rollback":
            self._roll_back(why)
        if policy == "stop":
            raise RefusedStep(f"{why}; no weight has moved, and {key}=skip or rollback would go on")
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > MOST_SKIPPED_IN_A_ROW:
            raise RefusedStep(f"{why}; the {MOST_SKIPPED_IN_A_ROW} steps before were skipped too: it is not the batch")
        for bias, before in self.biases:
            bias.copy_(before)
        self.say(f"skipped {why}")
        self.on_skipped()
        return True

    def _roll_back(self, why: str) -> None:
        """End the run so that the next launch goes on after this batch. The first rank looks for the checkpoint, and all ranks learn of it.

        Raises:
            RolledBack: it was recorded.
            RefusedStep: the run cannot go back, or has too often.
        """
        run_dir, step = Path(self.cfg.run.dir), get_args().curr_iteration + 1

        def decide() -> tuple[str | None, int | None]:
            problem, checkpoint = self._checkpoint_to_go_back_to(run_dir)
            if problem is None:
                record_rollback(run_dir, step, checkpoint, why)
            return problem, checkpoint

        problem, checkpoint = from_rank_0(decide)
        if problem is not None:
            raise RefusedStep(f"{why}; {problem}")
        raise RolledBack(f"{why}; back to step {checkpoint}")

    def _checkpoint_to_go_back_to(self, run_dir: Path) -> tuple[str | None, int | None]:
        """(why there is none, its step)."""
        try:
            checkpoint = newest_step(self.cfg)
        except ConfigError as error:  # none is intact
            return str(error), None
        return refusal(read_rollbacks(run_dir), checkpoint, self.cfg.train.max_rollbacks), checkpoint


def _step_and_samples() -> str:
    args = get_args()
    return f"step {args.curr_iteration + 1} ({in_samples(args.consumed_train_samples, args.global_batch_size)})"


def _samples_of_rank() -> list[tuple[int, int]]:
    """(first, number) of each micro-batch of this rank, as MegatronPretrainingSampler deals them out."""
    args = get_args()
    ranks, rank, size = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank(), args.micro_batch_size
    return [(args.consumed_train_samples + (index * ranks + rank) * size, size) for index in range(get_num_microbatches())]
