"""What watches a rank's steps: marks of its progress, the watchdog, its busy time, and whether a step is fit to be trained on.

Here are the places of a step where Megatron lets us in. What is done there is in each part's module.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config
from megatron.training import get_args

from megatron_ext.training.step import LOSS_NAME, forward_step
from megatron_ext.training.step_policy import StepPolicy
from megatron_ext.training.straggler import StragglerReport
from megatron_ext.training.watchdog import Watchdog
from ngpt.config import Config
from ngpt.progress import BACKWARD, DATA, EVALUATION, FORWARD, GRADIENTS, OPTIMIZER, Progress


class StepGuard:
    """Follows the steps of one rank."""

    def __init__(self, cfg: Config, rank: int, world_size: int):
        self.progress, self.stragglers = Progress(), StragglerReport(cfg.logging.straggler_ratio)
        self.watchdog = Watchdog(self.progress, Path(cfg.run.dir), rank, world_size, cfg.cluster.hang_timeout_s)

    def start(self) -> None:
        self.watchdog.start()

    def close(self) -> None:
        self.watchdog.stop()

    def attach(self, chunks: list, policy: StepPolicy) -> None:
        """Called with the wrapped model chunks once they are built."""
        self.policy = policy
        policy.attach(chunks)
        # Megatron takes the hook of the first chunk's config, and sets its own only where there is none.
        get_model_config(chunks[0]).finalize_model_grads_func = self._finalize_gradients

    def forward_step(self, batches: Iterator, model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        """Megatron's forward step with its operations marked."""
        step = get_args().curr_iteration + 1
        self.progress.begin_pass(DATA if model.training else EVALUATION, step)
        microbatch = self.progress.place.microbatch
        if model.training and microbatch == 1:
            self.stragglers.timer.start()
        batch = next(batches)
        if not model.training:
            return forward_step(iter((batch,)), model)
        self.progress.mark(FORWARD, step, microbatch)
        output, loss_function = forward_step(iter((batch,)), model)
        if output.requires_grad:  # its gradient is the first that backward computes on this stage
            output.register_hook(lambda _: self.progress.mark(BACKWARD, step, microbatch))

        def watched_loss(output: torch.Tensor) -> tuple:
            loss, tokens, report = loss_function(output)
            self.policy.monitor.add_loss(report[LOSS_NAME])
            return loss, tokens, report

        return output, watched_loss

    def mark_evaluation(self) -> None:
        """Called when a micro-batch begins, of an evaluation other than data.valid's."""
        self.progress.begin_pass(EVALUATION, get_args().curr_iteration + 1)

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        """The step's first synchronisation over data-parallel ranks, unless gradients are reduced while backward runs."""
        self.progress.mark(GRADIENTS)
        self.stragglers.timer.stop()
        self.policy.before_reduction()
        finalize_model_grads(*args, **kwargs)
        self.progress.mark(OPTIMIZER)
