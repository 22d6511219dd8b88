"""Which step's loss stands out from those before it. Pure: numbers in, a finding out; needs no torch."""

import math
import statistics
from collections import deque
from typing import NamedTuple

WINDOW, LEAST = 100, 20  # steps that the mean is taken over, and the fewest that allow a judgement
_FLAT = 0.005  # floor of the deviation as a fraction of the mean: a loss that hardly moves has a deviation near 0


class Spike(NamedTuple):
    """A loss above `mean` by `deviations` of the steps before it."""

    loss: float
    mean: float
    deviations: float

    def __str__(self) -> str:
        return f"the loss {self.loss:.4g} is {self.deviations:.1f} standard deviations above {self.mean:.4g}, its mean of the last steps"


class SpikeDetector:
    """Compares each step's loss with the running mean and deviation of the steps before it, since the launch.

    Args:
        threshold: A loss more standard deviations above the mean than this is a spike; None: no loss is.
    """

    def __init__(self, threshold: float | None):
        self.threshold = threshold
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def judge(self, loss: float) -> Spike | None:
        """The spike if a loss stands out, else None. Only `keep` adds a loss to the window."""
        if self.threshold is None or len(self.losses) < LEAST or not math.isfinite(loss):
            return None
        mean = statistics.fmean(self.losses)
        deviation = max(statistics.pstdev(self.losses), _FLAT * abs(mean))
        deviations = (loss - mean) / deviation if deviation else 0.0
        return Spike(loss, mean, deviations) if deviations > self.threshold else None

    def keep(self, loss: float) -> None:
        """The step was trained on."""
        if math.isfinite(loss):
            self.losses.append(loss)
