"""Retraction of the fp32 master weights inside Megatron's optimizer step.

The hook runs right after the inner torch optimizer has moved the masters: before Megatron copies them to the model weights and before any
parameter gather, overlapped or not. It is torch's public, process-wide optimizer hook, so nothing of Megatron is patched.
"""

from collections.abc import Callable
from functools import partial
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ngpt.optim.retraction import MatrixShard, Retraction, is_marked, retract_weights_, shards_of


def is_expert(param: nn.Parameter) -> bool:
    """Whether Megatron reduces the parameter's gradient over the expert data-parallel group."""
    return not getattr(param, "allreduce", True)


def master_shard(param: nn.Parameter, buffer=None) -> tuple[Tensor, int]:
    """This rank's fp32 master values of `param` as a flat view, and their position in the flattened parameter.

    Args:
        buffer: the DDP buffer that holds `param` where Megatron's DistributedOptimizer cuts it into shards; None where masters are whole.

    Source: megatron-core 0.19.2 core/optimizer/distrib_optimizer.py (`_build_model_and_main_param_groups`), whose shards are equal
        parts of each DDP bucket; core/optimizer/optimizer.py (`main_param` of Float16OptimizerWithFloat16Params).
    """
    master = getattr(param, "main_param", None)
    if buffer is None:
        return (param.data if master is None else master.data).view(-1), 0
    start, end, bucket_id = buffer.param_index_map[param]
    bucket, group = buffer.buckets[bucket_id], buffer.data_parallel_group
    size = bucket.grad_data.numel() // group.size()
    first, last = bucket.offset + group.rank() * size, bucket.offset + (group.rank() + 1) * size
    low, high = max(start, first) - start, min(end, last) - start
    if high <= low:
        return torch.empty(0, dtype=torch.float32, device=param.device), 0
    values = param.data.view(-1)[low:high] if param.dtype == torch.float32 else master.data
    assert values.numel() == high - low and values.dtype == torch.float32, "Megatron's shard layout moved"
    return values, low


def trained_parameters(chunks: list) -> list[tuple[str, nn.Parameter, object]]:
    """(name, parameter, its DDP buffer if a distributed optimizer shards it) of this rank's model chunks."""
    found = []
    for index, chunk in enumerate(chunks):
        sharded = chunk.ddp_config.use_distributed_optimizer
        buffers = {param: buffer for buffer in chunk.buffers + chunk.expert_parallel_buffers for param in buffer.param_index_map}
        for name, param in chunk.named_parameters():
            if param.requires_grad:
                found.append((f"{index}.{name.removeprefix('module.')}", param, buffers[param] if sharded else None))
    return found


class RetractionHook:
    """Retracts after every inner optimizer's step, and reports when a whole step is done.

    Args:
        chunks: this rank's model chunks, wrapped by Megatron's DistributedDataParallel.
        after_step: called once per optimizer step of the rank, after the last of its inner optimizers; it may communicate.

    Parallelism: at most one all-reduce per inner optimizer and step, over that optimizer's data-parallel group.
    """

    def __init__(self, chunks: list, after_step: Callable[[], None] | None = None):
        self.parameters = trained_parameters(chunks)
        self.after_step = after_step
        # Megatron builds one inner optimizer for dense and one for expert parameters.
        self.inner_optimizers = len({is_expert(param) for _, param, _ in self.parameters})
        self.retractions: dict[bool, Retraction] = {}
        self.stepped = 0
        self.handle = register_optimizer_step_post_hook(self)

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        expert = self._owner(optimizer)
        if expert is None:
            return
        if expert not in self.retractions:
            self.retractions[expert] = self._retraction(expert)
        self.retractions[expert]()
        self.stepped += 1
        if self.stepped == self.inner_optimizers:
            self.stepped = 0
            if self.after_step is not None:
                self.after_step()

    def retract_start(self, loaded: bool) -> None:
        """Retract the masters at step 0.

        Masters that were copied from BF16 weights have unit norm only up to their rounding. FP32 weights are their own masters. They are
        built with unit norms, but loaded ones may come from a BF16 run. Those are retracted whole, the same on every rank.
        """
        if loaded:
            retract_weights_(param for _, param, _ in self.parameters if param.dtype == torch.float32)
        for expert in sorted({is_expert(param) for _, param, _ in self.parameters}):
            self._retraction(expert, only_copies=True)()

    def remove(self) -> None:
        """Stop listening (the hook is process-wide)."""
        self.handle.remove()

    @staticmethod
    def _owner(optimizer: torch.optim.Optimizer) -> bool | None:
        """Whether the optimizer moves expert parameters; None for optimizers that are not Megatron's."""
        marks = {group.get("is_expert_parallel") for group in optimizer.param_groups}
        return bool(marks.pop()) if len(marks) == 1 and None not in marks else None

    def _retraction(self, expert: bool, only_copies: bool = False) -> Retraction:
        """The retraction of what one inner optimizer moves: its pieces of the marked matrices, and the ranks that hold the others."""
        marked = [
            (param, buffer)
            for _, param, buffer in self.parameters
            if is_marked(param) and is_expert(param) == expert and not (only_copies and param.dtype == torch.float32)
        ]
        groups = {buffer.data_parallel_group for _, buffer in marked if buffer is not None and buffer.data_parallel_group.size() > 1}
        assert len(groups) <= 1, "matrices of one optimizer live in different data-parallel groups"

        def find_shards() -> list[MatrixShard]:
            return [shard for param, buffer in marked for shard in shards_of(param, *master_shard(param, buffer))]

        return Retraction(find_shards, addresses_of([param for param, _ in marked]), _sum_over(groups.pop()) if groups else None)


def _sum_over(group: dist.ProcessGroup) -> Callable[[Tensor], object]:
    return partial(dist.all_reduce, group=group)


def addresses_of(params: list[nn.Parameter]) -> Callable[[], list[int]]:
    """A function that returns the masters' addresses. It is called before every step, so no line of Python runs for each matrix.

    It shows both ways of moving a master: another tensor as `main_param`, and other memory under the same tensor (`.data = ...`).
    """
    own = [param for param in params if getattr(param, "main_param", None) is None]
    attributes = [vars(param) for param in params if getattr(param, "main_param", None) is not None]
    main_param = itemgetter("main_param")
    return lambda: [*map(Tensor.data_ptr, own), *map(Tensor.data_ptr, map(main_param, attributes))]
