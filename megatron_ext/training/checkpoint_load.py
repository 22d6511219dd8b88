"""What comes before Megatron loads a checkpoint: which one, whether it is what was written, and whether it is of this model.

All ranks read a part of it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training import checkpointing, get_args, training
from torch.distributed.checkpoint import CheckpointException

from megatron_ext.training.collective import from_rank_0
from ngpt.checkpoints import manifest
from ngpt.checkpoints.choice import RULE, Choice, choose, listing
from ngpt.checkpoints.hashing import FileRecord
from ngpt.checkpoints.manifest import Damage, Manifest
from ngpt.config import Config, ConfigError
from ngpt.config.checkpoints import check_has_optimizer, check_same_model, config_of
from ngpt.config.kept_keys import check_kept_keys

READING_THREADS = 4  # of a rank


def choose_on_all_ranks(folder: str | Path, fallback: bool, verify: str) -> Choice | None:
    """The checkpoint to load, the same on every rank; see `ngpt.checkpoints.choice.choose`.

    Args:
        verify: full | sizes | none, `checkpoint.verify`.

    Parallelism: rank 0 looks at names and sizes; with `full` the ranks share the files out and gather what they find.
    """
    found = from_rank_0(lambda: listing(folder))
    return choose(found, fallback, functools.partial(_inspect, verify=verify))


def _inspect(folder: Path, verify: str) -> Damage | None:
    damage, files = from_rank_0(lambda: _look(folder, verify))
    if damage is not None or verify != "full":
        return damage
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    by_size = sorted(files, key=lambda name: (-files[name].size, name))
    own = manifest.compare(folder, {name: files[name] for name in by_size[rank::size]}, READING_THREADS)
    if size == 1:
        return next(iter(own), None)
    gathered: list[list[Damage]] = [[] for _ in range(size)]
    dist.all_gather_object(gathered, own)
    return next((damage for of_rank in gathered for damage in of_rank), None)


def _look(folder: Path, verify: str) -> tuple[Damage | None, dict[str, FileRecord]]:
    damage = manifest.inspect(folder, sizes=verify != "none")
    found = manifest.read(folder) if damage is None else None
    return damage, found.files if isinstance(found, Manifest) else {}


@contextmanager
def checked_loading(cfg: Config, say: Callable[[str], None]) -> Iterator[None]:
    """While the context lasts, Megatron's loop loads the checkpoint that is chosen here.

    Args:
        say: prints a line for a person, on the last rank.
    """
    upstream = training.load_checkpoint
    training.load_checkpoint = functools.wraps(upstream)(functools.partial(_load_checkpoint, cfg, say, upstream))
    try:
        yield
    finally:
        training.load_checkpoint = upstream


def _load_checkpoint(cfg: Config, say: Callable[[str], None], upstream: Callable, *args: Any, **kwargs: Any) -> tuple:
    folder = get_args().load
    choice = choose_on_all_ranks(folder, cfg.checkpoint.fallback, cfg.checkpoint.verify)
    if choice is None:
        raise ConfigError(str(folder), "no checkpoint", RULE, "It was there when the run started: restore it")
    from_rank_0(lambda: _check(cfg, choice))
    if choice.note() is not None:
        print(choice.note())  # into Megatron's log
        if not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1:
            say(choice.note())
    try:
        with _told_to_load(choice.step):
            return upstream(*args, **kwargs)
    except CheckpointException as error:
        cause = next((repr(failure[0]) for failure in error.failures.values()), str(error))
        way_out = f"Restore it, or write the step of an earlier one into {Path(folder) / 'latest_checkpointed_iteration.txt'}"
        raise ConfigError(str(choice.folder), f"cannot be loaded: {cause}", RULE, way_out) from error


def _check(cfg: Config, choice: Choice) -> None:
    """The launcher has looked at the published checkpoint, but this may be an older one."""
    check_same_model(cfg, choice)
    if not get_args().no_load_optim:
        check_has_optimizer(choice)
    if not get_args().no_load_optim and (saved := config_of(choice)) is not None:
        check_kept_keys(saved, cfg, choice.folder)


@contextmanager
def _told_to_load(step: int) -> Iterator[None]:
    """Upstream asks the tracker, which may name another checkpoint. Where upstream cannot read the tracker, it exits silently."""
    args, read = get_args(), checkpointing.read_metadata
    asked = args.ckpt_step
    args.ckpt_step, checkpointing.read_metadata = step, lambda _path: (step, False)
    try:
        yield
    finally:
        args.ckpt_step, checkpointing.read_metadata = asked, read
