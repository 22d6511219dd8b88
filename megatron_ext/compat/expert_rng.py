"""Every rank of an expert-parallel run resumes with its own random numbers.

Upstream (megatron-core 0.19.2), `training/checkpointing.py: get_rng_state` saves one state for each pipeline and tensor rank, that of the
first data-parallel rank, and `load_checkpoint` gives it (`rng_state[0]`) to all. Expert-parallel ranks are data-parallel ranks for the
rest of the model, and the stream `expert-parallel-rng` is seeded differently on each: after a resume they all draw the first one's.
Reason: a resumed run draws what the run that never stopped draws.
Goes when: upstream keeps the states of expert-parallel ranks apart.

With expert parallelism the saved list holds the state of each data-parallel rank (context-parallel ones included), and a rank finds its
own first in the list that it loads. A checkpoint of another number of ranks lacks a state for each. Then every rank keeps its newly
seeded expert stream and takes the rest from the first state.
"""

import functools
from typing import Any

import torch.distributed as dist

EXPERT_STREAM = "expert-parallel-rng"


def install() -> bool:
    """Wraps the two functions."""
    from megatron.training import checkpointing

    if not hasattr(checkpointing.get_rng_state, "__wrapped__"):
        checkpointing.get_rng_state = _of_all_ranks(checkpointing.get_rng_state)
        checkpointing._load_base_checkpoint = _own_state_first(checkpointing._load_base_checkpoint)
    return True


def _expert_parallel_group() -> dist.ProcessGroup | None:
    """The ranks whose states differ: all data-parallel ones where experts are spread over some of them, else None."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized() or parallel_state.get_expert_model_parallel_world_size() == 1:
        return None
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _of_all_ranks(upstream: Any) -> Any:
    @functools.wraps(upstream)
    def get_rng_state(ckpt_format: str, *args: Any, **kwargs: Any) -> Any:
        state, group = upstream(ckpt_format, *args, **kwargs), _expert_parallel_group()
        if ckpt_format == "torch_dist" and group is not None and len(state.data) == 1:
            gathered: list[Any] = [None] * group.size()
            dist.all_gather_object(gathered, state.data[0], group=group)
            state.data = gathered
        return state

    return get_rng_state


def _own_state_first(upstream: Any) -> Any:
    @functools.wraps(upstream)
    def load_base_checkpoint(*args: Any, **kwargs: Any) -> Any:
        loaded = upstream(*args, **kwargs)
        state_dict, group = loaded[0], _expert_parallel_group()
        if group is not None and isinstance((state_dict or {}).get("rng_state"), list):
            state_dict["rng_state"] = own_first(state_dict["rng_state"], group.size(), group.rank())
        return loaded

    return load_base_checkpoint


def own_first(states: list[dict[str, Any]], ranks: int, rank: int) -> list[dict[str, Any]]:
    """The list with this rank's state first, where it has one for each rank; else the first state with this rank's expert stream."""
    from megatron.core import tensor_parallel

    if len(states) == ranks:
        return [states[rank], *states[:rank], *states[rank + 1 :]]
    own = tensor_parallel.get_cuda_rng_tracker().get_states()
    first = dict(states[0])
    first["rng_tracker_states"] = first["rng_tracker_states"] | {name: own[name] for name in own.keys() & {EXPERT_STREAM}}
    return [first, *states[1:]]
