"""Post-training quantisation: the loss of held-out text where the block linears read quantised weights, inputs, or both.

The forward pass alone is quantised, in every block linear, also in those that the recipe would keep in high precision while training.
Sequences are read one at a time, so that an amax of inputs is one of a sequence, and a sequence's loss is its own.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ngpt.hf.modeling_ngpt import NGPTForCausalLM
from ngpt.model_analysis.intervals import Interval, text_interval
from ngpt.model_analysis.linears import Linear, block_linears
from ngpt.model_analysis.losses import sequence_losses
from ngpt.model_analysis.quantise import quantised_inputs, quantised_weight, quantised_weights, weight_spec
from ngpt.recipes import Recipe

# (whether inputs are quantised, block shape of the weights or None: not quantised)
ARMS: dict[str, tuple[bool, str | None]] = {
    "weights_1x16": (False, "1x16"),
    "weights_16x16": (False, "16x16"),
    "inputs": (True, None),
    "both_1x16": (True, "1x16"),
    "both_16x16": (True, "16x16"),
}


def ptq(
    model: NGPTForCausalLM, ids_NS: Tensor, recipe: Recipe, bits_per_nat: float | None, tick: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """Losses of every arm, and their paired differences from the model as it is.

    Args:
        ids_NS: [N, S + 1], at least 2 sequences.
        bits_per_nat: bits per byte of text that equal one nat per token; None: unknown.
        tick: called with the arm, the number of its sequences done, and the total.

    Returns:
        "unquantised" and "arms" by name: loss (nats per token) with a t interval over sequences, bits_per_byte; for arms also difference
        and bits_per_byte_difference, paired by sequence, and relative_difference. "weight_error": relative weight error by block shape.

    Raises:
        ConfigError: the recipe's blocks cannot tile a layer's features.
    """
    linears = block_linears(model)

    def losses(name: str) -> Tensor:
        return sequence_losses(model, ids_NS, at_once=1, tick=lambda done: tick(name, done, len(ids_NS)) if tick else None)

    whole = losses("unquantised")
    arms = {}
    for name, (inputs, blocks) in ARMS.items():
        with _quantised(linears, recipe, inputs, blocks):
            arms[name] = losses(name)
    return {
        "sequences": len(ids_NS),
        "own_weight_blocks": "x".join(map(str, weight_spec(recipe).block_shape)),
        "weight_error": {blocks: weight_error(linears, recipe, blocks) for blocks in ("1x16", "16x16")},
        "unquantised": _figures(whole, bits_per_nat),
        "arms": {name: _figures(found, bits_per_nat) | _differences(found, whole, bits_per_nat) for name, found in arms.items()},
    }


@contextmanager
def _quantised(linears: list[Linear], recipe: Recipe, inputs: bool, blocks: str | None) -> Iterator[None]:
    assert recipe.input is not None
    chosen = linears if inputs else []
    with quantised_weights(linears if blocks else [], weight_spec(recipe, blocks)), quantised_inputs(chosen, recipe.input.rowwise):
        yield


def weight_error(linears: list[Linear], recipe: Recipe, blocks: str | None = None) -> float:
    """||w_hat - w|| / ||w|| over all block linears together."""
    error = power = 0.0
    for linear in linears:
        weight = linear.weight().double()
        error += float((quantised_weight(linear, weight_spec(recipe, blocks)).double() - weight).square().sum())
        power += float(weight.square().sum())
    return math.sqrt(error / power)


def _figures(losses: Tensor, bits_per_nat: float | None) -> dict[str, Any]:
    return {"loss": text_interval(losses.tolist()), "bits_per_byte": _in_bits(losses, bits_per_nat)}


def _differences(losses: Tensor, whole: Tensor, bits_per_nat: float | None) -> dict[str, Any]:
    difference = losses - whole
    return {
        "difference": text_interval(difference.tolist()),
        "bits_per_byte_difference": _in_bits(difference, bits_per_nat),
        "relative_difference": float(difference.mean() / whole.mean()),
    }


def _in_bits(nats: Tensor, bits_per_nat: float | None) -> Interval | None:
    return None if bits_per_nat is None else text_interval((nats * bits_per_nat).tolist())
