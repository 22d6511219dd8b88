"""Which step's loss stands out from those before it. Pure: numbers in, a finding out; needs no torch."""

import math
import statistics
from collections import deque
from typing import NamedTuple

WINDOW, LEAST = 100, 20  # steps that the mean is taken over, and without which nothing is judged
_FLAT = 0.005  # a loss that hardly moves has a deviation near 0: below this part of its mean nothing stands out


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
        threshold: Standard deviations above the mean from which on a loss is a spike; None: none is.
    """

    def __init__(self, threshold: float | None):
        self.threshold = threshold
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def judge(self, loss: float) -> Spike | None:
        """Whether a loss stands out. It joins the others only by `keep`."""
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
