"""Which loss stands out."""

import math
import random

from ngpt.spikes import LEAST, WINDOW, SpikeDetector


def trained(detector, losses):
    """The spikes among losses that are all trained on."""
    spikes = []
    for loss in losses:
        spikes.append(detector.judge(loss))
        detector.keep(loss)
    return [spike for spike in spikes if spike]


def falling(steps, noise=0.05, seed=3):
    draw = random.Random(seed)
    return [2 + 6 * math.exp(-step / 300) + draw.gauss(0, noise) for step in range(steps)]


def test_a_usual_run_has_no_spike():
    assert trained(SpikeDetector(6.0), falling(5000)) == []


def test_a_spike_is_found_with_its_size():
    detector = SpikeDetector(6.0)
    trained(detector, falling(1000))
    spike = detector.judge(5.0)
    assert spike.loss == 5.0 and spike.deviations > 6 and "standard deviations above 2." in str(spike)


def test_a_low_loss_and_one_that_is_no_number_are_none():
    detector = SpikeDetector(6.0)
    trained(detector, falling(1000))
    assert [detector.judge(loss) for loss in (0.1, math.nan, math.inf)] == [None] * 3
    detector.keep(math.nan)
    assert all(math.isfinite(loss) for loss in detector.losses)


def test_nothing_is_judged_too_early_or_when_switched_off():
    assert trained(SpikeDetector(6.0), [1.0] * (LEAST - 1) + [100.0]) == []
    assert trained(SpikeDetector(None), [1.0] * WINDOW + [100.0]) == []


def test_a_flat_loss_may_still_move_a_little():
    detector = SpikeDetector(6.0)
    trained(detector, [2.0] * WINDOW)
    assert detector.judge(2.05) is None and detector.judge(2.07) is not None


def test_a_new_level_that_is_trained_on_becomes_the_usual():
    detector = SpikeDetector(6.0)
    assert 1 <= len(trained(detector, falling(500) + [4.0 + loss for loss in falling(500, seed=4)])) < 20
