"""Where a run goes on after rollbacks, and when it must not go back once more."""

import pytest

from ngpt.rollbacks import read_rollbacks, record_rollback, refusal, resume_step


def test_rollbacks_are_kept_in_order(tmp_path):
    assert read_rollbacks(tmp_path) == []
    record_rollback(tmp_path, 14, 10, "nan")
    record_rollback(tmp_path, 17, 10, "inf")
    kept = [(rollback["from"], rollback["to"], rollback["why"]) for rollback in read_rollbacks(tmp_path)]
    assert kept == [(14, 10, "nan"), (17, 10, "inf")]


@pytest.mark.parametrize(
    ("checkpoint", "step"),
    [
        (10, 17),  # behind the later one
        (15, 17),  # saved between: the second is still ahead
        (17, 17),
        (20, 20),
        (5, 5),  # an older checkpoint, of which nothing is known
        (0, 0),
    ],
)
def test_a_launch_goes_on_behind_the_batches_that_were_left(checkpoint, step):
    assert resume_step([{"from": 14, "to": 10}, {"from": 17, "to": 10}], checkpoint) == step


def test_going_back_to_one_checkpoint_has_an_end():
    rollbacks = [{"from": 14, "to": 10}, {"from": 17, "to": 10}, {"from": 25, "to": 20}]
    assert refusal(rollbacks, 20, 2) is None
    assert "as often as" in refusal(rollbacks, 10, 2)
    assert "no checkpoint" in refusal([], None, 2)
