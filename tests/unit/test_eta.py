"""The time that a run still takes, of step times that are given."""

import pytest

from ngpt.eta import Eta


def logged(*steps: tuple[int, float, float], of: int = 1000) -> list[float | None]:
    """What is left after each of (step, seconds a step, seconds between steps) of a run that logs them."""
    eta, now, before, left = Eta(of), 100.0, 0, []
    for step, step_time, between in steps:
        now += (step - before) * step_time + between
        before = step
        eta.add(step, step_time, now)
        left.append(eta.seconds_left())
    return left


def test_the_first_step_compiles_and_tells_nothing():
    assert logged((1, 60.0, 0.0)) == [None]
    assert logged((1, 60.0, 0.0), (10, 0.5, 0.0))[-1] == pytest.approx(990 * 0.5)


def test_a_run_that_resumes_counts_from_its_own_first_step():
    assert logged((501, 60.0, 0.0), (510, 0.5, 0.0))[-1] == pytest.approx(490 * 0.5)


def test_a_slow_step_moves_nothing():
    usual = [(step, 0.5, 0.0) for step in range(10, 110, 10)]
    slow = [(step, 30.0 if step == 60 else seconds, between) for step, seconds, between in usual]
    assert logged((1, 60.0, 0.0), *slow)[-1] == logged((1, 60.0, 0.0), *usual)[-1] == pytest.approx(900 * 0.5)


def test_evaluations_between_steps_are_counted_as_often_as_they_come():
    """25 s after every 100 steps of a second: 1.25 s a step."""
    steps = [(step, 1.0, 25.0 if step % 100 == 0 else 0.0) for step in range(10, 401, 10)]
    assert logged((1, 60.0, 0.0), *steps)[-1] == pytest.approx(600 * 1.25, rel=0.01)


@pytest.mark.parametrize(("slow", "seconds"), [(4, 1.0), (5, 3.0)])
def test_a_change_of_speed_is_followed_once_five_logged_intervals_have_it(slow, seconds):
    steps = [(step, 1.0 if step <= 500 else 3.0, 0.0) for step in range(10, 501 + 10 * slow, 10)]
    left = logged((1, 60.0, 0.0), *steps)[-1]
    assert left == pytest.approx((500 - 10 * slow) * seconds)


def test_at_the_last_step_nothing_is_left():
    assert logged((1, 60.0, 0.0), (10, 1.0, 0.0), of=10)[-1] == 0
