"""A number with its confidence interval, which may be unbounded."""

import math
from dataclasses import asdict, dataclass
from typing import Any

CONFIDENCE = 0.95
BETWEEN, OUTSIDE, ALL = "between", "outside", "all"


@dataclass(frozen=True)
class Interval:
    """A confidence interval around an estimate.

    Attributes:
        estimate: the estimate; NaN if the data give none.
        low, high: the ends; -inf and inf if unbounded.
        units: number of independent units (seeds, sequences) behind it.
        method: how it was computed, in words.
        shape: between (low to high), outside (up to low, and from high on), or all (the data exclude no value).
        confidence: how often such a set contains the true value.
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
        """Whether the data do not exclude this value."""
        if self.shape == OUTSIDE:
            return value <= self.low or value >= self.high
        return self.shape == ALL or self.low <= value <= self.high

    def lies_within(self, low: float, high: float) -> bool:
        """Whether the data exclude every value outside [low, high]."""
        return self.shape == BETWEEN and low <= self.low and self.high <= high

    def avoids(self, low: float, high: float) -> bool:
        """Whether the data exclude every value of [low, high]."""
        if self.shape == OUTSIDE:
            return self.low < low and high < self.high
        return self.shape == BETWEEN and (self.high < low or high < self.low)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON. Non-finite ones become null; `shape` says what they mean."""
        return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Interval":
        missing = {"estimate": math.nan, "low": -math.inf, "high": math.inf}
        return cls(**values | {key: value for key, value in missing.items() if values[key] is None})


def unknown(estimate: float, units: int, method: str) -> Interval:
    """The interval for data that exclude nothing."""
    return Interval(estimate, -math.inf, math.inf, units, method, ALL)
