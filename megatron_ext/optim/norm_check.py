"""An independent check of the norms of the master weights, with other arithmetic and other shard bounds than the retraction's."""

import math

import torch
import torch.distributed as dist
from torch import nn

from ngpt.optim.retraction import is_marked


@torch.no_grad()
def worst_norm_deviation(parameters: list[tuple[str, nn.Parameter, object]]) -> tuple[float, str]:
    """Largest | ||w|| - 1 | (infinite for NaN) over all unit vectors of this rank's marked matrices, and the matrix it was seen in.

    Rebuilds every matrix from its shards: each rank puts its fp32 master values into an array of zeros, the sum over the
    data-parallel group is the whole matrix, and its norms are taken in fp64, one matrix at a time.

    Args:
        parameters: (name, parameter, DDP buffer or None), see `megatron_ext.optim.retraction.trained_parameters`.

    Parallelism: one all-reduce per marked matrix over its data-parallel group: a check, not part of a step's cost.
    """
    worst, where = 0.0, "no marked matrix"
    for name, param, buffer in parameters:
        if not is_marked(param):
            continue
        master = getattr(param, "main_param", None)
        if buffer is None:
            whole = (param if master is None else master).detach().float()
        else:
            whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
            bucket = buffer.buckets[buffer.param_index_map[param][2]]
            bucket_start, bucket_end = bucket.param_to_index[param]
            rank, size = buffer.data_parallel_group.rank(), buffer.data_parallel_group.size()
            part = bucket.param_data.numel() // size
            mine = range(max(bucket_start, rank * part), min(bucket_end, (rank + 1) * part))
            if len(mine):
                piece = slice(mine.start - bucket_start, mine.stop - bucket_start)
                whole[piece] = param.detach().flatten()[piece] if master is None else master.detach()
            dist.all_reduce(whole, group=buffer.data_parallel_group)
        rows, cols = param.size(0) // param.num_matrices, param.size(1)
        norms = torch.linalg.vector_norm(whole.view(-1, rows, cols), dim=1 + param.unit_dim, dtype=torch.float64)
        deviation = (norms - 1).abs().max().item()
        if math.isnan(deviation):
            deviation = math.inf  # unlike NaN it compares, also in an all-reduce over ranks
        if deviation > worst:
            worst, where = deviation, name
    return worst, where
