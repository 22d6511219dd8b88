"""How fast the loss of held-out text rises around the weights: along random directions, and under noise of the quantiser's size.

Every point is the mean of a step and its opposite, y(r) = (L(+r) + L(-r)) / 2 - L(0), in which the slope cancels. Its curvature c is that
of y = c r^2, by least squares over the radii up to FIT_RADIUS. All points have the same sequences, and intervals are over directions and
sequences, both taken as drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ngpt.hf.modeling_ngpt import NGPTForCausalLM
from ngpt.model_analysis.directions import SCOPES, Matrix, gaussian, matrices, stepped
from ngpt.model_analysis.intervals import Interval, crossed_interval
from ngpt.model_analysis.linears import Linear, block_linears
from ngpt.model_analysis.losses import sequence_losses
from ngpt.model_analysis.quantise import quantised_weight, restored, weight_spec
from ngpt.model_analysis.request import DIRECTIONS, FIT_RADIUS, RADII
from ngpt.precision.rounding import stream_seed
from ngpt.recipes import Recipe


def flatness(
    model: NGPTForCausalLM,
    ids_NS: Tensor,
    recipe: Recipe,
    seed: int = 0,
    directions: int = DIRECTIONS,
    radii: Sequence[float] = RADII,
    tick: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The loss in the neighbourhood of the weights.

    Args:
        ids_NS: [N, S + 1], at least 2 sequences.
        recipe: its weight quantiser sets the size of the noise.
        directions: how many, at least 2.
        radii: at least one must not exceed FIT_RADIUS.
        tick: called with the number of points done, and the total.

    Returns:
        "directions" by scope ("blocks", "everything") and way ("plain"; for nGPT also "retracted"): "points", a list of radius and
        loss_change, and "curvature". "noise": relative_error and loss_change. "loss": at the weights. Losses are in nats per token.
    """
    ways = ("plain", "retracted") if any(matrix.is_unit for matrix in matrices(model, SCOPES[0])) else ("plain",)
    total = directions * (len(SCOPES) * len(ways) * len(radii) + 1)
    start, done = sequence_losses(model, ids_NS), 0

    def change(both: Callable[[float], AbstractContextManager]) -> np.ndarray:
        """y of every sequence, [S]."""
        nonlocal done
        sides = []
        for sign in (1.0, -1.0):
            with both(sign):
                sides.append(sequence_losses(model, ids_NS))
        done += 1
        if tick:
            tick(done, total)
        return (torch.stack(sides).mean(dim=0) - start).numpy()

    found: dict[str, dict[str, Any]] = {}
    for scope in SCOPES:
        chosen = matrices(model, scope)
        found[scope] = {way: _along(chosen, way, seed, directions, radii, change) for way in ways}
    linears = block_linears(model)
    errors = [_error(linear, recipe) for linear in linears]
    noise = np.stack([change(partial(_noisy, linears, errors, seed, number)) for number in range(directions)])
    return {
        "sequences": len(ids_NS),
        "loss": float(start.mean()),
        "directions": found,
        "noise": {"relative_error": _whole_error(linears, errors), "loss_change": crossed_interval(noise)},
    }


def _along(
    chosen: Sequence[Matrix], way: str, seed: int, directions: int, radii: Sequence[float], change: Callable[..., np.ndarray]
) -> dict[str, Any]:
    changes_RKS = np.stack(
        [
            np.stack([change(lambda sign, r=r, k=k: stepped(chosen, sign * r, seed, k, way == "retracted")) for k in range(directions)])
            for r in radii
        ]
    )
    points = [{"radius": r, "loss_change": crossed_interval(change_KS)} for r, change_KS in zip(radii, changes_RKS, strict=True)]
    return {"points": points, "curvature": fitted(radii, changes_RKS)}


def fitted(radii: Sequence[float], changes_RKS: np.ndarray) -> Interval:
    """c of y = c r^2, nats per token, by least squares through zero over the radii up to FIT_RADIUS."""
    squares = np.array([r**2 if r <= FIT_RADIUS else 0.0 for r in radii])
    return crossed_interval(np.tensordot(squares, changes_RKS, axes=1) / (squares**2).sum())


def _error(linear: Linear, recipe: Recipe) -> Tensor:
    """||w_hat - w|| / ||w|| of a linear, [1, 1], or of each expert, [E, 1, 1]."""
    weight = linear.weight().double()
    error = quantised_weight(linear, weight_spec(recipe)).double() - weight
    return error.norm(dim=(-2, -1), keepdim=True) / weight.norm(dim=(-2, -1), keepdim=True)


def _whole_error(linears: Sequence[Linear], errors: Sequence[Tensor]) -> float:
    powers = [(linear.weight().double().norm(dim=(-2, -1), keepdim=True) ** 2) for linear in linears]
    error = sum(float((error**2 * power).sum()) for error, power in zip(errors, powers, strict=True))
    return (error / sum(float(power.sum()) for power in powers)) ** 0.5


@contextmanager
def _noisy(linears: Sequence[Linear], errors: Sequence[Tensor], seed: int, number: int, sign: float) -> Iterator[None]:
    """Adds Gaussian noise to the weights. For each matrix, or each expert's, its relative size is that of the quantisation error there."""
    with restored(parameter for linear in linears for parameter in linear.parameters):
        for linear, error in zip(linears, errors, strict=True):
            weight = linear.weight()
            drawn = gaussian(weight, stream_seed(seed, 1, linear.name, number, 0))
            size = error * weight.double().norm(dim=(-2, -1), keepdim=True) / drawn.double().norm(dim=(-2, -1), keepdim=True)
            linear.write(weight + drawn * (sign * size).to(weight.dtype))
        yield
