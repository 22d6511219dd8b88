"""How long this rank works until it arrives at a step's first data-parallel synchronisation, and the report over all ranks.

Megatron's own detector (core/utils.py: StragglerDetector) is not used: it times the forward pass alone, where a caller brackets it. It
prints minima and maxima at every interval without judging them, reads temperature and power, which a CPU lacks, and opens a port.
"""

import statistics
import time

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.device import capturing, on_gpu
from ngpt.straggler import StragglerWatch


class StepTimer:
    """Busy seconds of this rank, from its first micro-batch to the gradient reduction of each step.

    On a GPU they come from events on the device's own stream, which are read a logging interval later, so nothing waits for them. Ranks
    that share a sample (tensor, context, pipeline and expert parallelism) wait for each other inside, and are slow together.
    """

    def __init__(self) -> None:
        self.on_gpu = on_gpu()
        self.started: torch.cuda.Event | float | None = None
        self.spans: list[tuple] = []

    def start(self) -> None:
        self.started = None if capturing() else self._now()

    def stop(self) -> None:
        if self.started is not None and not capturing():
            self.spans.append((self.started, self._now()))
        self.started = None

    def drain(self) -> float:
        """Median seconds of the steps since the last call, 0 without any. The median, since one slow step does not make a slow rank."""
        spans, self.spans = self.spans, []
        seconds = [start.elapsed_time(end) / 1000 if self.on_gpu else end - start for start, end in spans]
        return statistics.median(seconds) if seconds else 0.0

    def _now(self) -> "torch.cuda.Event | float":
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StragglerReport:
    """Gathers the busy times once a logging interval. Every rank knows the result.

    Args:
        ratio: logging.straggler_ratio.
    """

    def __init__(self, ratio: float | None):
        self.timer, self.watch = StepTimer(), StragglerWatch(ratio)

    def report(self) -> list[str]:
        """Lines for a person. Parallelism: one world all-gather of two numbers."""
        group = min(dist.get_process_group_ranks(parallel_state.get_data_parallel_group()))
        own = torch.tensor([[self.timer.drain(), group]], dtype=torch.float64, device=torch.cuda.current_device())
        everyone = own.new_zeros(dist.get_world_size(), 2)
        dist.all_gather_into_tensor(everyone, own)
        busy, peers = {}, {}
        for rank, (seconds, first) in enumerate(everyone.tolist()):
            busy[rank] = seconds
            peers.setdefault(first, []).append(rank)
        return self.watch.report(busy, list(peers.values()))
