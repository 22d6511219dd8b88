"""A run leaves together: what Megatron's loop asks after each step and during evaluation, and what it does when one rank wants to stop.

Source: megatron-core 0.19.2 training/training.py. Its own signal handler knows one signal. It looks only between steps and before a
periodic save, so a signal during a save costs another step and another save. Here a request is agreed on after the step's own saves.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.training import get_args, get_timers, training

from megatron_ext.device import capturing
from ngpt.lifetime import outlive_parent
from ngpt.stopping import StopRequest


class EvaluationInterrupted(Exception):
    """Every rank leaves the evaluation at the same batch."""


class Stopper:
    """Agrees among all ranks on leaving, and makes Megatron's loop do it.

    Args:
        request: of this rank; None: it never asks, and follows the others.

    Attributes:
        agreed: whether all ranks have agreed to leave.
    """

    def __init__(self, request: StopRequest | None):
        self.request, self.agreed = request, False
        self._group: dist.ProcessGroup | None = None

    def agree(self) -> bool:
        """Whether any rank has been asked to stop.

        Parallelism: all ranks call this together; the hosts all-reduce one number, and nobody waits for a device.
        """
        if not self.agreed:
            asked = self.request is not None and self.request.signal is not None
            flag = torch.tensor([asked], dtype=torch.int32)
            if dist.get_world_size() > 1:
                dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._hosts())
            self.agreed = bool(flag.item())
            if self.agreed:
                outlive_parent()  # torchrun kills what has not left 30 s after the signal, and a save may take longer
        return self.agreed

    def _hosts(self) -> dist.ProcessGroup:
        """All ranks, through gloo; made at the first call."""
        if self._group is None:
            timeout = timedelta(minutes=get_args().distributed_timeout_minutes)
            self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        return self._group

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Megatron's loop asks `agree` while the context lasts."""
        wrapped = {
            "checkpoint_and_decide_exit": self._decide_exit,
            "get_forward_backward_func": self._asking_in_evaluation,
            "evaluate": self._interruptible,
        }
        upstream = {name: getattr(training, name) for name in wrapped}
        for name, wrap in wrapped.items():
            setattr(training, name, functools.wraps(upstream[name])(wrap(upstream[name])))
        try:
            yield
        finally:
            for name, function in upstream.items():
                setattr(training, name, function)

    def _decide_exit(self, upstream: Callable) -> Callable:
        def checkpoint_and_decide_exit(model, optimizer, scheduler, step: int, flops: float, context: dict, batches: Any) -> bool:
            if upstream(model, optimizer, scheduler, step, flops, context, batches):
                return True
            if not self.agree():
                return False
            args = get_args()
            saved = args.save_interval and step % args.save_interval == 0
            if args.save and not saved:
                training.save_checkpoint_and_time(step, model, optimizer, scheduler, flops, context, train_data_iterator=batches)
            return True

        return checkpoint_and_decide_exit

    def _asking_in_evaluation(self, upstream: Callable) -> Callable:
        """All pipeline stages enter the schedule of a batch together, while nothing is in flight between them."""

        def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable:
            schedule = upstream(*args, **kwargs)

            @functools.wraps(schedule)
            def asking(*args: Any, forward_only: bool = False, **kwargs: Any) -> Any:
                if forward_only and not capturing() and self.agree():
                    raise EvaluationInterrupted
                return schedule(*args, forward_only=forward_only, **kwargs)

            return asking

        return get_forward_backward_func

    def _interruptible(self, upstream: Callable) -> Callable:
        def evaluate(forward_step_func, data_iterator, model, process_non_loss_data_func, config, *args: Any, **kwargs: Any) -> tuple:
            try:
                return upstream(forward_step_func, data_iterator, model, process_non_loss_data_func, config, *args, **kwargs)
            except EvaluationInterrupted:
                config.timers = get_timers()
                for chunk in model:
                    chunk.train()
                return None, None, True  # what upstream returns where its time limit is reached

        return evaluate
