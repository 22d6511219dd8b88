"""Megatron's loop calls what `loop_marks` wraps by the names of its module, in the way the wrappers expect."""

import contextlib
import inspect
import re

import pytest
from megatron.training import training

from megatron_ext.compat.loop_marks import loop_marks
from ngpt.progress import BEGIN, LOAD, LOGGING, SAVE, Progress

FUNCTIONS = (training.pretrain, training.train, training.setup_model_and_optimizer)
PRETRAIN, TRAIN, SETUP = (inspect.getsource(function) for function in FUNCTIONS)


def test_upstream_still_calls_these_names():
    assert "model, optimizer, opt_param_scheduler = setup_model_and_optimizer(" in PRETRAIN
    assert "= load_checkpoint(" in SETUP
    assert re.search(r"^    save_checkpoint\($", inspect.getsource(training.save_checkpoint_and_time), re.MULTILINE)
    assert "maybe_finalize_async_save(blocking=True" in TRAIN and "maybe_finalize_async_save(blocking=False)" in TRAIN
    assert re.search(r"\) = train_step\(\n[^\n]*iteration=iteration,", TRAIN)


def test_upstream_keeps_a_hook_that_finalizes_gradients():
    assert "config.finalize_model_grads_func is None" in TRAIN and "model_cfg = get_model_config(model[0])" in PRETRAIN


@pytest.fixture
def fake(monkeypatch):
    """Megatron's functions replaced by ones that say where the rank is."""
    progress = Progress()

    def see(*args, **kwargs):
        return progress.place.operation, progress.place.step

    for name in ("train_step", "save_checkpoint", "load_checkpoint", "maybe_finalize_async_save"):
        monkeypatch.setattr(training, name, see)
    monkeypatch.setattr(training, "setup_model_and_optimizer", lambda: ("model", "optimizer", "scheduler"))
    return progress


def test_operations_are_marked_and_left(fake):
    fake.mark(LOGGING, 4)
    built = []
    with loop_marks(fake, built.append, contextlib.nullcontext):
        assert training.save_checkpoint() == (SAVE, 4)
        assert training.load_checkpoint() == (LOAD, 4)
        assert training.maybe_finalize_async_save(blocking=True) == (SAVE, 4)
        assert training.maybe_finalize_async_save(blocking=False) == (LOGGING, 4)
        assert training.setup_model_and_optimizer() == ("model", "optimizer", "scheduler") and built == ["optimizer"]
        assert fake.place[:2] == (LOGGING, 4)
        assert training.train_step(iteration=4) == (BEGIN, 5)
    assert training.save_checkpoint() == (BEGIN, 5)


def test_a_failed_save_is_left_too(fake, monkeypatch):
    def fail():
        raise OSError("disk full")

    monkeypatch.setattr(training, "save_checkpoint", fail)
    with pytest.raises(OSError), loop_marks(fake, print, contextlib.nullcontext):
        training.save_checkpoint()
    assert fake.place.operation != SAVE and training.save_checkpoint is fail


def test_training_steps_run_within_what_is_put_around_them_and_nothing_else_does(fake, monkeypatch):
    inside = []

    @contextlib.contextmanager
    def around():
        inside.append(None)
        try:
            yield
        finally:
            inside.pop()

    for name in ("train_step", "evaluate", "save_checkpoint", "load_checkpoint"):
        monkeypatch.setattr(training, name, lambda *args, **kwargs: len(inside))
    with loop_marks(fake, print, around):
        assert training.train_step(iteration=4) == 1
        assert training.evaluate() == training.save_checkpoint() == training.load_checkpoint() == len(inside) == 0


def test_upstream_evaluates_behind_the_step_and_moves_the_weights_within_it():
    assert "optimizer.step()" in inspect.getsource(training.train_step)
    assert "evaluate_and_print_results(" in TRAIN and "evaluate" not in inspect.getsource(training.train_step)
