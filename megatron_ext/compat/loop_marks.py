"""Marks in Megatron's training loop for what it does between our own calls: steps, saves and loads; and the optimizer it builds.

Upstream (megatron-core 0.19.2): `training/training.py` calls `train_step`, `save_checkpoint`, `load_checkpoint`,
`maybe_finalize_async_save` and `setup_model_and_optimizer` by their module's names and offers no callback around them; the optimizer is a
local of `pretrain`.
Reason: a watchdog tells a long save from a hang, a step whose gradients are not finite is left out before the optimizer moves, and
quantised weights are kept within a step and no longer.
Goes when: upstream has callbacks there.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

from megatron.training import training

from ngpt.progress import BEGIN, LOAD, SAVE, Progress


@contextmanager
def loop_marks(
    progress: Progress, on_optimizer: Callable[[Any], None], around_step: Callable[[], AbstractContextManager]
) -> Iterator[None]:
    """Within it, steps, saves and loads are marked in `progress`.

    Args:
        on_optimizer: gets Megatron's optimizer once it is built.
        around_step: gives what each training step runs in, its optimizer's step included.
    """

    def marked(function: Callable, operation: str, only: Callable[[dict], bool] = lambda kwargs: True) -> Callable:
        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not only(kwargs):
                return function(*args, **kwargs)
            before = progress.place
            progress.mark(operation)
            try:
                return function(*args, **kwargs)
            finally:
                progress.mark(before.operation, before.step, before.microbatch)

        return wrapped

    def begin_step(*args: Any, **kwargs: Any) -> tuple:
        progress.mark(BEGIN, kwargs["iteration"] + 1)
        with around_step():
            return originals["train_step"](*args, **kwargs)

    def set_up(*args: Any, **kwargs: Any) -> tuple:
        model, optimizer, scheduler = originals["setup_model_and_optimizer"](*args, **kwargs)
        on_optimizer(optimizer)
        return model, optimizer, scheduler

    names = ("train_step", "save_checkpoint", "load_checkpoint", "maybe_finalize_async_save", "setup_model_and_optimizer")
    originals = {name: getattr(training, name) for name in names}
    training.train_step = begin_step
    training.save_checkpoint = marked(training.save_checkpoint, SAVE)
    training.load_checkpoint = marked(training.load_checkpoint, LOAD)
    # Called at every step without blocking.
    training.maybe_finalize_async_save = marked(training.maybe_finalize_async_save, SAVE, lambda kwargs: kwargs.get("blocking", False))
    training.setup_model_and_optimizer = set_up
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(training, name, original)
