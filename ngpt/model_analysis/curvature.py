"""The largest eigenvalue of the Hessian by power iteration, and its trace by Hutchinson's estimator.

The coordinates are those of `ngpt.model_analysis.hessian`.

Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ngpt.hf.modeling_ngpt import NGPTForCausalLM
from ngpt.model_analysis.directions import SCOPES, gaussian, matrices
from ngpt.model_analysis.hessian import Hessian, Vector
from ngpt.model_analysis.intervals import crossed_interval, text_interval
from ngpt.precision.rounding import stream_seed

ITERATIONS = 30
PROBES = 10
LENGTH = 1024  # most tokens per sequence: memory of attention without fused kernels grows with the square
TOLERANCE = 1e-3  # relative change of the eigenvalue

_TINY = 1e-300

type Product = Callable[[Vector], Vector]


def curvature(
    model: NGPTForCausalLM,
    ids_NS: Tensor,
    seed: int = 0,
    method: str = "double_backward",
    iterations: int = ITERATIONS,
    probes: int = PROBES,
    tick: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Largest eigenvalue and trace of the Hessian of the mean loss of some sequences.

    Args:
        ids_NS: [N, S + 1], at least 2 sequences. At most the first LENGTH tokens of each are predicted.
        method: one of `ngpt.model_analysis.request.METHODS`.
        iterations: most steps of the power iteration. probes: number of probes for the trace, at least 2.
        tick: called with the scope, the products done, and their largest possible number.

    Returns:
        By scope ("blocks", "everything"): "top_eigenvalue", nats per token, with an interval over sequences for a fixed eigenvector;
        "iterations", and "residual" ||Hv - av|| / |a|, a relative distance within which an eigenvalue certainly lies; "trace", with an
        interval over probes and sequences; "rows" and "parameters", to compare the traces of models of different sizes.
    """
    ids_NS, found = ids_NS[:, : LENGTH + 1], {}
    for scope in SCOPES:
        ticks = itertools.count(1)
        total = (iterations + probes) * len(ids_NS)

        def one_more(scope: str = scope, ticks: Iterator[int] = ticks, total: int = total) -> None:
            done = next(ticks)
            if tick and done % len(ids_NS) == 0:
                tick(scope, done, total)

        found[scope] = _of_scope(Hessian(model, matrices(model, scope), ids_NS, method, one_more), seed, iterations, probes)
    return {"sequences": len(ids_NS), "length": ids_NS.size(1) - 1, "method": method, "scopes": found}


def _of_scope(hessian: Hessian, seed: int, iterations: int, probes: int) -> dict[str, Any]:
    start = hessian.tangent([gaussian(m.parameter, stream_seed(seed, 0, m.name, 0, 0)) for m in hessian.matrices])
    top = largest_eigenvalue(hessian.mean_product, start, iterations)
    sequences = range(len(hessian.ids_NS))
    held = [float(dot(top.vector, hessian.product(top.vector, sequence))) for sequence in sequences]
    traces = []
    for number in range(1, probes + 1):
        signs = [gaussian(m.parameter, stream_seed(seed, 0, m.name, number, 0)).sign() for m in hessian.matrices]
        probe = hessian.tangent(signs)
        traces.append([float(dot(probe, hessian.product(probe, sequence))) for sequence in sequences])
    return {
        "top_eigenvalue": text_interval(held),
        "iterations": top.iterations,
        "residual": top.residual,
        "trace": crossed_interval(np.array(traces)),
        "parameters": sum(matrix.parameter.numel() for matrix in hessian.matrices),
        "rows": sum(norms.numel() for norms in hessian.norms),
    }


class Eigenvalue(NamedTuple):
    """An eigenvalue of a symmetric operator. residual: ||Hv - av|| / |a| for its vector v of norm 1."""

    value: float
    vector: Vector
    iterations: int
    residual: float


def largest_eigenvalue(product: Product, start: Vector, iterations: int) -> Eigenvalue:
    """The largest eigenvalue, not the one of largest magnitude: if that one is negative, the operator is shifted by it.

    Args:
        product: maps v to H v.
        start: the first vector, not zero.
        iterations: most products, including those after a shift.
    """
    found = _power_iteration(product, start, 0.0, iterations)
    if found.value < 0 and found.iterations < iterations:
        shifted = _power_iteration(product, start, found.value, iterations - found.iterations)
        found = shifted._replace(iterations=shifted.iterations + found.iterations)
    return found


def _power_iteration(product: Product, start: Vector, shift: float, iterations: int) -> Eigenvalue:
    """Iterates H - shift. The eigenvalue and the residual are those of H."""
    vector, value, residual = _scaled(start), math.inf, math.inf
    for number in range(1, iterations + 1):
        image = product(vector)
        before, value = value, float(dot(vector, image))
        residual = norm([part - value * own for part, own in zip(image, vector, strict=True)]) / max(abs(value), _TINY)
        done = number == iterations or abs(value - before) <= TOLERANCE * abs(value) or residual <= TOLERANCE
        if done or norm(image) == 0:
            break
        vector = _scaled([part - shift * own for part, own in zip(image, vector, strict=True)])
    return Eigenvalue(value, vector, number, residual)


def dot(a: Vector, b: Vector) -> Tensor:
    """Dot product in fp64, on the device."""
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum()


def norm(vector: Vector) -> float:
    return math.sqrt(float(dot(vector, vector)))


def _scaled(vector: Vector) -> Vector:
    length = norm(vector)
    return [part / length for part in vector]
