"""Collects the quantisation figures of a rank's linear layers during one health step."""

import torch
from torch import Tensor

from ngpt.precision.diagnostics import RESAMPLES, SAMPLES, GemmWatch
from ngpt.recipes import Recipe


class Diagnostics:
    """The figures of every low-precision linear of this rank, from the first micro-batch of a step. One object a step.

    The routed experts of a layer share a name. The first one on this rank that gets tokens is watched, padding included.

    A linear asks for a watch at the start of each call (`watch`) and hands it its operands in both passes. `figures` waits for the device
    once.

    Parallelism: local, nothing is communicated. Under tensor parallelism the figures are those of this rank's shard: of the dot products
        over its features for a row-parallel layer, of its output features for a column-parallel one. Layers of other pipeline stages
        are on their ranks.

    Args:
        samples, resamples, seed: as in `ngpt.precision.diagnostics.product_figures`.
    """

    def __init__(self, samples: int = SAMPLES, resamples: int = RESAMPLES, seed: int = 0):
        self._options = samples, resamples, seed
        self._watches: dict[str, GemmWatch] = {}

    def watch(self, name: str, recipe: Recipe) -> GemmWatch | None:
        """The watch for linear `name`, with this recipe, at its first call that a backward pass will follow; None for every other call.

        A forward pass without gradients belongs to an evaluation, or activation recompute will run it again.
        """
        if name in self._watches or not torch.is_grad_enabled():
            return None
        self._watches[name] = GemmWatch(recipe, *self._options)
        return self._watches[name]

    def figures(self) -> dict[str, float]:
        """Everything recorded so far.

        Returns:
            `precision/<layer>/<input|weight|grad_output>/<figure>` with relative_error, snr_db, saturated_fraction and flushed_fraction,
            `precision/<layer>/<fprop|dgrad|wgrad>/<figure>` with the figures of `product_figures`, and for wgrad zero_fraction. Not finite
            where a tensor is all zeros or exact.
        """
        scalars: dict[str, Tensor] = {}
        for name, watch in self._watches.items():
            scalars |= {f"precision/{name}/{figure}": value for figure, value in watch.figures.items()}
        return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True)) if scalars else {}
