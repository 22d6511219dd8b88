"""Decisions that one rank takes for all."""

import pickle
from collections.abc import Callable

import torch.distributed as dist

from ngpt.config.errors import ConfigError


def from_rank_0[Value](decide: Callable[[], Value]) -> Value:
    """Gives every rank what `decide` returns on rank 0. What it raises there is raised on every rank.

    Parallelism: one broadcast of a small object.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return decide()
    answer: list = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except Exception as error:  # the others wait in the broadcast
            answer[1] = _portable(error)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def _portable(error: Exception) -> Exception:
    """The error itself, or only its text where it cannot be pickled."""
    if isinstance(error, ConfigError):
        return ConfigError(error.path, error.got, error.rule, error.way_out)
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
