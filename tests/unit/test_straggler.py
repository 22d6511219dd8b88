"""Who is told to be slow, and when nobody is."""

import random

from ngpt.straggler import REPORTS, StragglerWatch

FOUR = [[0, 1, 2, 3]]


def reports(watch, busy, times, peers=FOUR):
    return [line for _ in range(times) for line in watch.report(dict(enumerate(busy)), peers)]


def test_a_rank_that_stays_slow_is_told_once_and_again_when_it_recovers():
    watch = StragglerWatch(1.25)
    assert reports(watch, [1.0, 1.0, 1.0, 1.42], REPORTS - 1) == []
    told = reports(watch, [1.0, 1.0, 1.0, 1.42], 3 * REPORTS)
    assert told == ["rank 3 is slow: 1.42x the median step of its peers for the last 5 reports"]
    assert watch.figures() == {"slowest_rank": 3, "slowest_rank_ratio": 1.42}
    assert reports(watch, [1.0] * 4, 3 * REPORTS) == ["rank 3 is no longer slow: 1.00x the median step of its peers"]


def test_of_two_ranks_the_slower_one_is_told_by_its_full_ratio():
    assert reports(StragglerWatch(1.25), [2.0, 1.0], REPORTS, [[0, 1]])[0].startswith("rank 0 is slow: 2.00x")


def test_noise_and_single_slow_reports_are_no_straggler():
    draw, watch = random.Random(5), StragglerWatch(1.25)
    lines = []
    for report in range(2000):
        busy = {rank: 1 + 0.1 * draw.random() for rank in range(4)}
        busy[draw.randrange(4)] *= 3 if report % 3 == 0 else 1  # a pause somewhere, often
        lines += watch.report(busy, FOUR)
    assert lines == []


def test_stages_of_a_pipeline_are_compared_with_their_peers_alone():
    assert reports(StragglerWatch(1.25), [1.0, 1.0, 2.0, 2.0], 2 * REPORTS, [[0, 1], [2, 3]]) == []


def test_without_peers_times_or_a_ratio_nothing_is_told():
    watch = StragglerWatch(1.25)
    assert reports(watch, [1.0, 9.0], 2 * REPORTS, [[0], [1]]) == [] and watch.figures() == {}
    assert reports(watch, [0.0] * 4, 2 * REPORTS) == []
    silent = StragglerWatch(None)
    assert reports(silent, [1.0, 1.0, 1.0, 9.0], 2 * REPORTS) == [] and silent.figures()["slowest_rank"] == 3
