"""Which step's loss stands out from those before it. Pure: numbers in, a finding out; needs no torch.

`SpikeDetector` judges a step while a run trains, so that the step can be left out. `loss_spikes` counts in what a run has recorded.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

WINDOW, LEAST = 100, 20  # steps that the mean is taken over, and the fewest that allow a judgement
RECORDS, FEWEST_RECORDS = 50, 10  # of `loss_spikes`: records before one that it is judged by, and the fewest that allow a judgement
_LEAST_NATS, _DEVIATIONS = 0.2, 6
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


class LossSpike(NamedTuple):
    """A jump of a recorded loss. `place`: index of its first record. `height`: nats of its highest record above the median before it."""

    place: int
    height: float


def loss_spikes(losses: Sequence[float]) -> list[LossSpike]:
    """The spikes of a recorded training loss.

    A record is high if it is above the median of up to 50 finite records before it by more than 0.2 nats and by more than 6 times their
    median absolute deviation from it, or if it is not finite. High records in a row are one spike. The first 10 finite records are not
    judged.

    A median and a median deviation, because a spike among the 50 would raise a mean and a standard deviation, and hide the next one. Six
    median deviations are about four standard deviations of normal noise. As 50 records estimate them roughly, a record of noise exceeds
    them once in 2,500 (simulated). The 0.2 nats keep the count at 0 in ordinary runs: with noise of 0.04 nats a record is high once in
    about 2.5 million, with 0.05 nats once in 40,000. While a loss falls, the median lags above it, so that only larger jumps are seen. A
    run that stays at a higher level has had one spike.

    Args:
        losses: in nats, in the order of the steps. A spike between two records is not seen: logging.interval=1 records every step.
    """
    found: list[LossSpike] = []
    before: deque[float] = deque(maxlen=RECORDS)
    in_spike = False
    for index, loss in enumerate(losses):
        height = math.inf if not math.isfinite(loss) else _height(loss, before)
        if height and in_spike:
            found[-1] = LossSpike(found[-1].place, max(found[-1].height, height))
        elif height:
            found.append(LossSpike(index, height))
        in_spike = bool(height)
        if math.isfinite(loss):
            before.append(loss)
    return found


def _height(loss: float, before: Sequence[float]) -> float:
    """Nats above the median of what was before, 0 where that is not high."""
    if len(before) < FEWEST_RECORDS:
        return 0.0
    median = statistics.median(before)
    deviation = statistics.median(abs(value - median) for value in before)
    height = loss - median
    return height if height > max(_LEAST_NATS, _DEVIATIONS * deviation) else 0.0
