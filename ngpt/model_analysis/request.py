"""A request to `ngpt analyze`. Imports no torch, so that a wrong request fails before that slow import."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.data.validation import sequences_of_split
from ngpt.recipes import Recipe

SEQUENCES = {"snr": 8, "ptq": 32, "flatness": 8, "curvature": 8}  # read by default; for snr, batches
HALVES = 2  # snr splits its batches in halves, each of which needs an interval
DIRECTIONS = 6
RADII = (0.02, 0.05, 0.1, 0.2, 0.4)
FIT_RADIUS = 0.1  # the curvature is fitted to radii up to this one
METHODS = ("double_backward", "differences")  # of computing products with the Hessian


@dataclass(frozen=True)
class Request:
    """One analysis of one model.

    Attributes:
        what: one of `ngpt.model_analysis.ANALYSES`.
        splits: prefixes of prepared data. length: tokens per sequence. sequences: how many to read.
        batch_size: for snr, sequences per GEMM.
        dtype: the model's dtype.
        recipe: the recipe whose quantisers are used.
        seed: for choosing the text and for all other random draws.
        directions, radii: for flatness. hvp: for curvature, one of METHODS.
    """

    what: str
    splits: tuple[str, ...]
    length: int
    sequences: int
    batch_size: int
    dtype: str
    recipe: Recipe
    seed: int
    directions: int = DIRECTIONS
    radii: tuple[float, ...] = RADII
    hvp: str = METHODS[0]

    def options(self) -> dict[str, Any]:
        """The options that determine the result, in JSON types."""
        shared = {"splits": list(self.splits), "length": self.length, "tokens": self.sequences * self.length}
        shared |= {"dtype": self.dtype, "seed": self.seed}
        if self.what == "curvature":
            return shared | {"hvp": self.hvp}
        shared |= {"recipe": self.recipe.name, "quantisers": self.recipe.describe()}
        if self.what == "snr":
            return shared | {"batch_size": self.batch_size}
        return shared | ({"directions": self.directions, "radii": list(self.radii)} if self.what == "flatness" else {})


def available(prefixes: Sequence[str], length: int) -> int:
    """How many sequences are available when splits take turns.

    Raises:
        ConfigError: a split is missing, or holds no whole sequence.
    """
    return min(sequences_of_split(prefix, length) for prefix in prefixes) * len(prefixes)


def sequences_wanted(what: str, tokens: int | None, length: int, there: int, batch_size: int) -> int:
    """How many sequences an analysis reads.

    Args:
        tokens: how many were asked for; None: SEQUENCES, or as many as there are.
        length: tokens per sequence. there: sequences in the text.
        batch_size: for snr, which reads an even number of batches.

    Raises:
        ConfigError: there is less text than was asked for or than the analysis needs.
    """
    multiple = HALVES * batch_size if what == "snr" else 1
    least = 2 * multiple  # an interval needs at least two
    if tokens is not None and tokens > there * length:
        rule = f"The text has {there:,} sequences of {length} tokens"
        raise ConfigError("--tokens", tokens, rule, "Ask for less, or name another --split")
    wanted = min(SEQUENCES[what] * (batch_size if what == "snr" else 1), there) if tokens is None else tokens // length
    wanted -= wanted % multiple
    if wanted < least:
        rule = f"{what} needs {least} sequences of {length} tokens for an interval, {least * length:,} in all"
        way_out = "Ask for more" if least <= there else f"The text has {there:,} sequences: name another --split"
        way_out += ", or set a smaller --batch-size" if what == "snr" else ""
        raise ConfigError("--tokens", there * length if tokens is None else tokens, rule, way_out)
    return wanted
