"""Around Megatron's save: it writes into a staging folder, and what it wrote is published whole or not at all.

Source: megatron-core 0.19.2 training/checkpointing.py (`save_checkpoint`), whose tracker is written in place, without being flushed, and
which reuses a folder with whatever an interrupted save has left in it. The shards are hashed and checked on their way
(`megatron_ext.compat.shard_writer`); `ngpt.checkpoints.publish` has the order of the last steps.
"""

import functools
import importlib.metadata
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training import checkpointing, get_args, training

from megatron_ext.compat import shard_writer
from megatron_ext.compat.shard_writer import NotEnoughSpace, Problem
from megatron_ext.optim.saved_tensors import unit_dims_of
from megatron_ext.training.collective import from_rank_0
from ngpt.checkpoints import publish, retention
from ngpt.checkpoints.choice import choose_by_sizes
from ngpt.checkpoints.manifest import Manifest
from ngpt.checkpoints.publish import CheckpointNotWritten
from ngpt.config import Config, ConfigError
from ngpt.config.compose import to_yaml
from ngpt.data.manifest import split_of

PACKAGES = ("ngpt-megatron", "megatron-core", "torch", "transformer-engine")


class CheckpointRefused(RuntimeError):
    """What was to be saved is wrong, or what the disk gives back: nothing is published."""


@dataclass(frozen=True)
class _Save:
    """One save under way: its step, where it is written, and the position in the data when it began."""

    step: int
    staging: Path
    samples: int


class CheckpointSaver:
    """Publishes what Megatron's loop saves, on one rank.

    Args:
        cfg: of the run; its checkpoint section says where, how many stay, and what a full disk means.
        say: prints a line for a person.
        folder: where checkpoints go; None: where the config says.
        norm_tolerance: the largest | norm - 1 | of a vector; None: the config's.
        extra: marks of the layout for the manifest.

    Attributes:
        published: the step of the newest checkpoint that this process published; None before the first.
        skipped: why the newest save was skipped (checkpoint.on_full_disk=continue); None where it was published.
    """

    def __init__(
        self,
        cfg: Config,
        say: Callable[[str], None],
        *,
        folder: Path | None = None,
        norm_tolerance: float | None = None,
        extra: dict[str, Any] | None = None,
    ):
        self.cfg, self.say, self.folder = cfg, say, folder or Path(cfg.checkpoint.dir)
        self.norm_tolerance = cfg.debug.norm_tolerance if norm_tolerance is None else norm_tolerance
        self.extra = extra or {}
        self.published: int | None = None
        self.skipped: CheckpointNotWritten | None = None
        self.has_begun = False
        self.removals: list[threading.Thread] = []
        self.published = False  # whether this launch has

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Megatron's loop saves through this while the context lasts.

        Raises:
            CheckpointNotWritten: on leaving, where the last save of the run was skipped for lack of space.
        """
        upstream = training.save_checkpoint
        training.save_checkpoint = functools.wraps(upstream)(functools.partial(self._save, upstream))
        try:
            yield
            self._require_last()
        except SystemExit:  # Megatron's own exits come here, too
            self._require_last()
            raise
        finally:
            training.save_checkpoint = upstream
            for removal in self.removals:
                removal.join()

    def _require_last(self) -> None:
        if self.skipped is not None:
            raise self.skipped

    def _save(self, upstream: Callable, step: int, *args: Any, non_persistent_ckpt: bool = False, **kwargs: Any) -> None:
        if non_persistent_ckpt:
            upstream(step, *args, non_persistent_ckpt=True, **kwargs)
            return
        save = _Save(step, publish.staging_folder(self.folder, step), get_args().consumed_train_samples)
        shard_writer.expect_outcome(save.staging, asynchronous=get_args().async_save)
        problem = from_rank_0(lambda: self._begin(save))
        if problem is None:
            try:
                with self._redirected(save):
                    upstream(step, *args, **kwargs)
            except NotEnoughSpace as error:
                problem = Problem(str(self.folder), f"the save needs {_gb(error.needed)}, {_gb(error.free)} are free", publish.FULL_DISK)
        if problem is not None or not get_args().async_save:
            self._conclude(save, problem)

    def _begin(self, save: _Save) -> Problem | None:
        try:
            if not self.has_begun:
                publish.clear(self.folder)
            self.has_begun = True
            publish.make_staging(self.folder, save.step)
        except OSError as error:
            return Problem.of(error, str(save.staging))
        return None

    @contextmanager
    def _redirected(self, save: _Save) -> Iterator[None]:
        """Upstream writes into the staging folder and leaves the tracker alone. The state gives the rules for its tensors."""
        replaced = {
            "get_checkpoint_name": lambda *_, **__: str(save.staging),
            "get_checkpoint_tracker_filename": lambda _folder: os.devnull,
            "generate_state_dict": functools.partial(self._with_rules, checkpointing.generate_state_dict),
            "schedule_async_save": functools.partial(self._concluded_later, checkpointing.schedule_async_save, save),
        }
        upstream = {name: getattr(checkpointing, name) for name in replaced}
        for name, function in replaced.items():
            setattr(checkpointing, name, function)
        try:
            yield
        finally:
            for name, function in upstream.items():
                setattr(checkpointing, name, function)

    def _with_rules(self, upstream: Callable, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = upstream(*args, **kwargs)
        unit_dims = unit_dims_of(state, masters_are_weights=self.cfg.precision.dtype == "fp32")
        shard_writer.set_rules(unit_dims, self.norm_tolerance)
        return state

    def _concluded_later(self, upstream: Callable, save: _Save, request: Any) -> None:
        """An asynchronous save is concluded on every rank once all have written."""
        finalize = list(request.finalize_fns)

        def conclude() -> None:
            for function in finalize:
                function()
            self._conclude(save, None)

        request.finalize_fns[:] = [conclude]
        upstream(request)

    def _conclude(self, save: _Save, problem: Problem | None) -> None:
        """Publishes what was written, or removes it. Every rank calls it; rank 0 acts, and all ranks learn the outcome."""
        problem, previous = from_rank_0(lambda: self._publish(save, problem))
        shard_writer.forget_outcome(save.staging)
        if problem is None:
            self.published, self.skipped = save.step, None
            return
        if not problem.errno:
            kept = "none was published before" if previous is None else f"the one of step {previous} is intact"
            raise CheckpointRefused(f"the checkpoint of step {save.step} is not published, {kept}: {problem.path}: {problem.what}")
        error = CheckpointNotWritten(problem.path, problem.what, publish.is_full(problem.errno), previous)
        if not (error.is_full and self.cfg.checkpoint.on_full_disk == "continue"):
            raise error
        self.skipped = error
        if dist.get_rank() == dist.get_world_size() - 1:
            self.say(f"note: the save of step {save.step} is skipped. {error}")

    def _publish(self, save: _Save, problem: Problem | None) -> tuple[Problem | None, int | None]:
        """On rank 0.

        Returns:
            (why nothing is published, the step of the published checkpoint then).
        """
        outcome = shard_writer.take_outcome(save.staging) if problem is None else None
        problem = outcome.problem if outcome is not None else problem
        if problem is None:
            try:
                publish.publish(self.folder, self._manifest(save), to_yaml(self.cfg), outcome.files)
            except OSError as error:
                problem = Problem.of(error, str(save.staging))
        if problem is None:
            self._retain(save.step)
            return None, save.step
        publish.discard(save.staging)
        return problem, self._previous()

    def _manifest(self, save: _Save) -> Manifest:
        sources = []
        for source in [] if self.cfg.data.mock else self.cfg.data.train:
            try:
                prepared, split = split_of(source.path)
                sources.append({"path": source.path, "weight": source.weight, "bin_sha256": prepared.splits[split].bin_sha256})
            except ConfigError:  # gone or replaced while the run goes on
                sources.append({"path": source.path, "weight": source.weight, "bin_sha256": None})
        data = {"consumed_samples": save.samples, "tokens": save.samples * self.cfg.train.seq_length, "sources": sources}
        return Manifest(save.step, {}, {name: _version(name) for name in PACKAGES}, data, self.extra)

    def _previous(self) -> int | None:
        try:
            choice = choose_by_sizes(self.folder)
        except ConfigError:
            return None
        return None if choice is None else choice.step

    def _retain(self, newest: int) -> None:
        keep_last, keep_every = self.cfg.checkpoint.keep_last, self.cfg.checkpoint.keep_every
        try:
            if not self.published:
                retention.give_up_future(self.folder, get_args().iteration, newest)
            self.published = True
            superseded = retention.set_aside(self.folder, newest, keep_last, keep_every)
        except OSError as error:  # only space is lost
            self.say(f"note: old checkpoints stay: {error}")
            return
        if superseded:
            self.removals = [removal for removal in self.removals if removal.is_alive()]
            self.removals.append(threading.Thread(target=retention.remove, args=(superseded,)))
            self.removals[-1].start()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gb(size: int) -> str:
    return f"{size / 1e9:,.3f} GB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
