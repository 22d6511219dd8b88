"""What the low-precision linears of one rank share: the step, its quantised weights, the stochastic rounding streams, the diagnostics."""

import math
import statistics
from collections import Counter

import torch
import torch.distributed as dist

from megatron_ext.precision.weights import StepWeights
from ngpt.config.sizes import last_low_precision_step
from ngpt.precision.diagnostics import GemmWatch
from ngpt.precision.recorder import Diagnostics
from ngpt.precision.rounding import stream_seed
from ngpt.recipes import Recipe


class PrecisionState:
    """Shared by the linears of this rank. The training loop tells it which step runs.

    Seeds of stochastic rounding are a function of (run seed, rank, linear, step, backward pass of that linear within the step) and of
    nothing else: a resumed run rounds like one that never stopped, recompute changes nothing, and no generator's state is saved.

    Args:
        seed: `train.seed`.
        rank: global rank.
        steps: `train.steps`.
        bf16_tail: the last part of the steps, 0 to 1, that computes in high precision.
        seeds_device: Transformer Engine's kernels round stochastically, from torch's generator of the device. Megatron seeds it alike on
            data-parallel ranks, so it gets a seed of its own rank and step.
        keeps_weights: `ngpt.config.executor.keeps_quantized_weights`.
    """

    def __init__(
        self, seed: int, rank: int, steps: int, bf16_tail: float = 0.0, seeds_device: bool = False, keeps_weights: bool = False
    ):
        self.seed, self.rank = seed, rank
        self.last_low_precision_step = last_low_precision_step(steps, bf16_tail)
        self.step, self.seeds_device = 0, seeds_device
        self.weights = StepWeights(keeps_weights)
        self.diagnostics: Diagnostics | None = None  # recorder of the current step, where it is watched
        self._backward_passes: Counter[int] = Counter()

    def begin_step(self, step: int, watched: bool = False) -> None:
        """Called before each forward pass; a new step restarts the streams.

        Args:
            watched: whether the diagnostics of this step are wanted.
        """
        if step != self.step:
            self.step = step
            self._backward_passes.clear()
            self.diagnostics = Diagnostics() if watched else None
            if self.seeds_device:
                torch.cuda.manual_seed(stream_seed(self.seed, self.rank, module=0, step=step, call=0))

    @property
    def active(self) -> bool:
        """False in the tail of the run, which trains in bf16."""
        return self.step <= self.last_low_precision_step

    def watch(self, name: str, recipe: Recipe) -> GemmWatch | None:
        """What takes the figures of this call of a linear, or None."""
        return self.diagnostics.watch(name, recipe) if self.diagnostics else None

    def figures(self) -> dict[str, float]:
        """The figures of the watched step, each the mean over the ranks that have it and its bounds; {} where nothing was watched.

        Parallelism: every rank calls this together; their dictionaries are gathered.
        """
        if self.diagnostics is None:
            return {}
        everyone: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, self.diagnostics.figures())
        found: dict[str, list[float]] = {}
        for figures in everyone:
            unusable = {_without_bound(name) for name, value in figures.items() if not math.isfinite(value)}
            for name, value in figures.items():
                if _without_bound(name) not in unusable:  # a figure and its bounds are means over the same ranks
                    found.setdefault(name, []).append(value)
        return {name: statistics.fmean(found[name]) for name in sorted(found)}

    def next_rounding_seed(self, linear: int) -> int:
        """Seed for the next backward pass of the linear with this index."""
        call = self._backward_passes[linear]
        self._backward_passes[linear] += 1
        return stream_seed(self.seed, self.rank, linear, self.step, call)


def _without_bound(name: str) -> str:
    """The figure that `name` names, or whose bound it names."""
    return name.removesuffix("_lower").removesuffix("_upper")
