"""Which loss stands out."""

import math
import random

import pytest

from ngpt.spikes import LEAST, WINDOW, LossSpike, SpikeDetector, loss_spikes


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


@pytest.mark.parametrize("seed", range(5))
def test_a_usual_record_of_losses_has_no_spike(seed):
    assert loss_spikes(falling(2000, seed=seed)) == []


def test_records_in_a_row_are_one_spike_and_it_hides_no_other():
    losses = falling(3000, noise=0.02)[2000:]
    for index, height in ((500, 1.0), (501, 3.0), (502, 0.5), (510, 0.9), (600, math.inf), (601, 0.9), (700, math.nan)):
        losses[index] += height
    found = loss_spikes(losses)
    assert [spike.place for spike in found] == [500, 510, 600, 700]
    assert found[0].height == pytest.approx(3.0, abs=0.1) and found[1].height == pytest.approx(0.9, abs=0.1)
    assert [spike.height for spike in found[2:]] == [math.inf, math.inf]


@pytest.mark.parametrize(("jump", "spread", "spikes"), [(0.19, 0.0, 0), (0.21, 0.0, 1), (0.59, 0.1, 0), (0.61, 0.1, 1)])
def test_the_bound_is_a_height_or_six_median_deviations_whichever_is_more(jump, spread, spikes):
    """Losses of 2 - spread and 2 + spread in turn, an equal number: the median is 2, the median deviation is the spread."""
    assert len(loss_spikes([2 + spread * (-1) ** index for index in range(40)] + [2 + jump])) == spikes


def test_a_higher_level_is_one_spike_and_becomes_the_usual():
    losses = [2.0] * 100 + [4.0] * 100
    assert loss_spikes(losses) == [LossSpike(100, 2.0)]
    assert [spike.place for spike in loss_spikes([*losses, 9.0, 4.0])] == [100, 200]


def test_only_the_records_right_before_one_judge_it():
    assert loss_spikes([9.0] * 100 + [2.0] * 50 + [3.0]) == [LossSpike(150, 1.0)]
    assert loss_spikes([9.0] * 30 + [2.0] * 20 + [3.0]) == []
    assert loss_spikes([2.0] * 9 + [9.0]) == [] == loss_spikes([])
    assert loss_spikes([math.nan, *[2.0] * 10, 9.0]) == [LossSpike(0, math.inf), LossSpike(11, 7.0)]
