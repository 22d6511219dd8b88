"""Each data-parallel rank saves and loads its own rows of the optimizer state, whatever buckets the gradients are in.

Upstream (megatron-core 0.19.2), `core/optimizer/distrib_optimizer.py: DistributedOptimizer`, the fully reshardable format:
- `sharded_param_state_fully_reshardable` cuts the state of each parameter out of one tensor for all buckets. Its offsets count the padding
  at the end of each bucket, which that tensor lacks: behind the first padded bucket every state is saved from the wrong place, and the
  masters and moments of a resumed run belong to other entries, without an error;
- both saving and loading hold the whole fp32 state of all data-parallel ranks in the memory of every rank's host.
Here a rank saves the rows (along the first axis) whose first entry it holds. They come from its own memory, and the end of its last row
from the ranks behind it. It loads every row of which it holds any entry. Keys and global tensors are upstream's, cut into other chunks, so
checkpoints of either side load on the other. A checkpoint whose masters are not its model's weights was written with the wrong offsets and
is refused.
Reason: a run with several buckets resumes exactly, and the host memory of a save falls with the number of data-parallel ranks.
Goes when: upstream saves each rank's part in a format that reshards over every kind of parallelism.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ngpt.config.errors import ConfigError

# BF16 rounds to 2^-9 of a weight; twice that also bounds a conversion that truncates. FP16 stops at 2^-24.
MODEL_ROUNDING = {"rtol": 2**-8, "atol": 2**-24}
KEYS = "keys"  # names of the parameters, kept beside their numbers while a state dict is loaded


def install() -> bool:
    """Replaces both directions of the fully reshardable format."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not hasattr(DistributedOptimizer.sharded_param_state_fully_reshardable, "__wrapped__"):
        for name, ours in (
            ("sharded_param_state_fully_reshardable", sharded_param_state),
            ("load_parameter_state_from_fully_reshardable", load_parameter_state),
        ):
            setattr(DistributedOptimizer, name, functools.wraps(getattr(DistributedOptimizer, name))(ours))
    return True


def sharded_param_state(self: Any, model_sharded_state_dict: dict, is_loading: bool = False, metadata: dict | None = None) -> dict:
    """{number of the parameter: {name of the state: [pieces of this rank]}}: what this rank saves, or where it loads to.

    Args:
        self: The distributed optimizer.
        model_sharded_state_dict: How the model's parameters are cut by the other kinds of parallelism.
        is_loading: The pieces are empty, to be read into.
        metadata: Upstream's switches; none applies.

    Parallelism: one all-gather a bucket of the longest row of its parameters, over the data-parallel group.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    bases = {base.data: base for base in nested_values(extract_sharded_tensors_and_factories(model_sharded_state_dict)[0])}
    rows = _rows_to_load if is_loading else _rows_to_save
    numbers, state, keys = _numbers(self), {}, {}
    for param, first, tensors in rows(self):
        number, base = numbers[param], bases[param]
        keys[number] = base.key
        if len(tensors["param"]):
            state[number] = {name: _pieces(self, base, name, first, tensor) for name, tensor in tensors.items()}
    # Never saved. Without it the state of a rank that holds no entry of any parameter would not come back, not even empty.
    return state | {KEYS: LocalNonpersistentObject(keys)}


@torch.no_grad()
def load_parameter_state(self: Any, state_dict: dict) -> None:
    """Sets this rank's entries from the rows that were read.

    Raises:
        ConfigError: masters are not the weights of the model, on any rank of the data-parallel group.
    """
    numbers, strangers = _numbers(self), []
    for _, _, param_map in _buckets(self):
        for param, ranges in param_map.items():
            low, high = ranges["param"].start, ranges["param"].end
            skipped = low % _row_length(param)
            number = numbers[param]
            tensors = {}
            for name, pieces in state_dict[number].items():
                flat = pieces[0].flatten() if len(pieces) == 1 else torch.cat([piece.flatten() for piece in pieces])
                tensors[name] = flat[skipped : skipped + high - low]
            if not _is_rounded(param, low, tensors["param"]):
                strangers.append(state_dict[KEYS][number])
            self._set_main_param_and_optimizer_states(param, tensors)
    _refuse_strangers(strangers, self.data_parallel_group)


def _buckets(optimizer: Any) -> Iterator[tuple[Any, Any, dict]]:
    """(buffer, bucket, {parameter: its ranges on this rank}) for every bucket."""
    for buffer, ranges_of_dtypes in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True):
        for ranges_of_buckets in ranges_of_dtypes.values():
            for bucket, ranges in zip(buffer.buckets, ranges_of_buckets, strict=True):
                yield buffer, bucket, ranges["param_map"]


def _numbers(optimizer: Any) -> dict[Tensor, int]:
    """The number of each parameter in the state dict, which is the same on all data-parallel ranks."""
    return {param: number for number, param in enumerate(param for buffer in optimizer.buffers for param in buffer.param_index_map)}


def _row_length(param: Tensor) -> int:
    """Entries of a row; the first axis counts rows."""
    return param.numel() // param.shape[0]


def _rows_to_load(optimizer: Any) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
    """(parameter, first row, empty tensors by name) for the rows of which this rank holds entries."""
    names = ("param", *optimizer.optimizer_state_keys)
    for _, _, param_map in _buckets(optimizer):
        for param, ranges in param_map.items():
            length = _row_length(param)
            first, last = ranges["param"].start // length, -(-ranges["param"].end // length)
            yield param, first, {name: torch.empty((last - first, *param.shape[1:]), dtype=torch.float32) for name in names}


def _rows_to_save(optimizer: Any) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
    """(parameter, first row, fp32 tensors on the CPU by name) for the rows that begin on this rank.

    The tensors are copies: an asynchronous writer may read them while training goes on.
    """
    names = ("param", *optimizer.optimizer_state_keys)
    for buffer, bucket, param_map in _buckets(optimizer):
        states = {param: optimizer._get_main_param_and_optimizer_states(param) for param in param_map}
        following = _following(buffer, bucket, param_map, states, names)
        for param, ranges in param_map.items():
            length, low, high = _row_length(param), ranges["param"].start, ranges["param"].end
            first, last = -(-low // length), -(-high // length)
            shape, missing = (last - first, *param.shape[1:]), last * length - high
            tensors = {}
            for index, name in enumerate(names):
                own = states[param][name].detach()[first * length - low :].to("cpu", torch.float32)
                rest = following[index, : missing if last > first else 0]
                tensors[name] = torch.cat([own, rest]).view(shape)
            yield param, first, tensors


def _following(buffer: Any, bucket: Any, param_map: dict, states: dict, names: tuple[str, ...]) -> Tensor:
    """[states, entries] of what the next ranks of the group hold of the bucket, as far as the longest row may reach."""
    group, rank = buffer.data_parallel_group, buffer.data_parallel_group.rank()
    held = bucket.grad_data.numel() // group.size()
    reach = min(held, max(map(_row_length, bucket.params_list)) - 1)
    head = torch.zeros(len(names), reach, dtype=torch.float32)
    for param, ranges in param_map.items():
        start, end = ranges["gbuf_local"].start, min(ranges["gbuf_local"].end, reach)
        for index, name in enumerate(names if start < end else ()):
            head[index, start:end] = states[param][name].detach()[: end - start]
    if group.size() == 1 or reach == 0:
        return head[:, :0]
    head = head.to(bucket.grad_data.device)
    heads = [torch.empty_like(head) for _ in range(group.size())]
    dist.all_gather(heads, head, group=group)
    # Where a row is longer than all that a rank holds, it goes on in the rank after the next.
    return torch.cat([head[:, :0], *heads[rank + 1 :]], dim=1).cpu()


def _pieces(optimizer: Any, base: Any, name: str, first: int, tensor: Tensor) -> list:
    """The sharded tensors of rows `first` and following of a parameter's state.

    Args:
        base: How the parameter is cut: a sharded tensor, or a factory that makes several of it (gate and up projection, the parts of a
            Mamba mixer's input projection). A factory is shown the numbers of the rows, which tells where each of its tensors begins.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    key = f"optimizer.state.{name}.{base.key}"
    # The group's copies of a parameter have one owner a row: none is a replica of another.
    replica_id = (*base.replica_id[:2], optimizer.distributed_optimizer_instance_id)
    if isinstance(base, ShardedTensor):
        parts = [(0, replace(base, key=key, replica_id=replica_id, data=None))]
    else:
        shape = base.data.shape
        rows = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)
        built = base.build_fn(key, rows, replica_id, None)
        parts = [(int(part.data[(0,) * part.data.dim()]), replace(part, data=None)) for part in nested_values(built)]
    pieces = []
    for start, part in sorted(parts, key=lambda pair: pair[0]):
        low, high = max(start, first), min(start + part.local_shape[0], first + len(tensor))
        if low < high:
            pieces.append(_narrowed(part, low - start, tensor[low - first : high - first]))
    return pieces


def _narrowed(part: Any, skipped: int, rows: Tensor) -> Any:
    """The sharded tensor `part` without its first `skipped` rows, holding `rows`."""
    axes = part.prepend_axis_num  # such as the axis of experts: a grid that is not even must hold them as its own axes
    rows = rows.view(*[1] * axes, *rows.shape)
    offset = list(part.global_offset)
    offset[axes] += skipped
    changes = {"local_shape": tuple(rows.shape), "global_offset": tuple(offset), "axis_fragmentations": None, "prepend_axis_num": 0}
    return replace(part, data=rows, dtype=rows.dtype, **changes)


def _is_rounded(param: Tensor, low: int, master: Tensor) -> bool:
    """Whether the entries of `param` from `low` on are those of `master`, rounded. Quantised weights are not compared."""
    if type(param.data) is not Tensor or not param.is_contiguous():
        return True
    weights = param.detach().view(-1)[low : low + master.numel()]
    return torch.allclose(weights.float(), master.to(weights.device), **MODEL_ROUNDING, equal_nan=True)


def _refuse_strangers(strangers: list[str], group: dist.ProcessGroup) -> None:
    from megatron.training import get_args

    found: list[list[str] | None] = [None] * group.size()
    dist.all_gather_object(found, strangers, group=group)
    names = sorted({name for part in found for name in part})
    if not names:
        return
    folder = getattr(get_args(), "load", None)
    rule = (
        f"The fp32 masters of {len(names)} weights ({names[0]} is one) are not the weights of the model beside them: it was written by a "
        "version that saved the optimizer state behind a padded gradient bucket from the wrong place"
    )
    way_out = f"Its weights are intact: start a new optimizer from them with run.name=NEW checkpoint.load={folder}"
    raise ConfigError("checkpoint", folder, rule, way_out)
