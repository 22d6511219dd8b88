"""A number with its confidence interval, which may have no end."""

import math
from dataclasses import asdict, dataclass
from typing import Any

CONFIDENCE = 0.95
BETWEEN, OUTSIDE, ALL = "between", "outside", "all"


@dataclass(frozen=True)
class Interval:
    """A confidence interval around an estimate.

    Attributes:
        estimate: NaN where the data give none.
        low, high: the ends. Of a set without an end -inf and inf.
        units: independent units (seeds, sequences) that it rests on.
        method: how it was made, in words.
        shape: between (low to high), outside (up to low, and from high on), or all (the data exclude no value).
        confidence: how often such a set holds the truth.
    """

    estimate: float
    low: float
    high: float
    units: int
    method: str
    shape: str = BETWEEN
    confidence: float = CONFIDENCE

    @property
    def bounded(self) -> bool:
        return self.shape == BETWEEN and math.isfinite(self.low) and math.isfinite(self.high)

    def holds(self, value: float) -> bool:
        """Whether the data leave this value possible."""
        if self.shape == OUTSIDE:
            return value <= self.low or value >= self.high
        return self.shape == ALL or self.low <= value <= self.high

    def lies_within(self, low: float, high: float) -> bool:
        """Whether the data exclude every value outside of [low, high]."""
        return self.shape == BETWEEN and low <= self.low and self.high <= high

    def avoids(self, low: float, high: float) -> bool:
        """Whether the data exclude every value of [low, high]."""
        if self.shape == OUTSIDE:
            return self.low < low and high < self.high
        return self.shape == BETWEEN and (self.high < low or high < self.low)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is null, and `shape` says what is meant."""
        return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Interval":
        missing = {"estimate": math.nan, "low": -math.inf, "high": math.inf}
        return cls(**values | {key: value for key, value in missing.items() if values[key] is None})


def unknown(estimate: float, units: int, method: str) -> Interval:
    """The interval of data that exclude nothing."""
    return Interval(estimate, -math.inf, math.inf, units, method, ALL)
