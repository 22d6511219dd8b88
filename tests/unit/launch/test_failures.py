"""The line that names the cause of a failed launch."""

import pytest

from launch.failures import cause, hang_cause
from launch.run_folder import first_failure
from ngpt.progress import write_json


def hung(rank, operation="gradients", step=6, microbatch=0, waits=True, size=3, **more):
    place = {"rank": rank, "world_size": size, "operation": operation, "step": step, "microbatch": microbatch}
    return place | {"time": 100.0 - rank, "idle_s": 60.6, "waits": waits, "line": "megatron/x.py:7", "kind": "hang"} | more


def beat(record, **more):
    return {key: record[key] for key in ("rank", "world_size", "operation", "step", "microbatch", "idle_s")} | more


STUCK = hung(1, "forward", microbatch=2, waits=False)


def test_the_rank_that_is_behind_is_the_cause():
    line = hang_cause([hung(0), STUCK, hung(2)])
    assert line == (
        "hang: rank 1 has been in forward of step 6, micro-batch 2 for 61 s (megatron/x.py:7); "
        "ranks 0, 2 waited in the gradient reduction of step 6"
    )


@pytest.mark.parametrize(
    ("stuck", "others"),
    [
        (hung(1, "optimizer", step=6), [hung(0, "forward", step=7, microbatch=1), hung(2, "forward", step=7, microbatch=1)]),  # weights
        (hung(1, "forward", microbatch=2, waits=False), [hung(0, "forward", microbatch=2), hung(2, "forward", microbatch=1)]),  # tensor
        (hung(1, "data", microbatch=3, waits=False), [hung(0, "forward", microbatch=1), hung(2, "backward", microbatch=1)]),  # pipeline
        (hung(1, "save", step=4), [hung(0, "begin", step=5), hung(2, "begin", step=5)]),
        (hung(1, "evaluation", microbatch=1, waits=False), [hung(0, "evaluation", microbatch=2), hung(2, "evaluation", microbatch=2)]),
        (
            hung(1, "optimizer", collective={"number": 8, "state": "scheduled"}),
            [hung(rank, "optimizer", collective={"number": 8, "state": "started"}) for rank in (0, 2)],
        ),
    ],
)
def test_the_one_that_others_wait_for_is_named(stuck, others):
    assert hang_cause([*others, stuck]).startswith("hang: rank 1 has been in ")


def test_a_rank_that_could_leave_no_record_is_named_from_its_heartbeat():
    waiting = [hung(0), hung(2)]
    line = hang_cause(waiting, [beat(record) for record in [*waiting, STUCK]])
    assert line.startswith("hang: rank 1 has not answered since forward of step 6, micro-batch 2 (stopped, or its machine is gone); ranks")
    assert hang_cause(waiting).endswith("; nothing is known of rank 1")


def test_ranks_of_an_earlier_larger_launch_are_left_out():
    assert "rank 7" not in hang_cause([hung(0), STUCK, hung(2)], [beat(hung(7, step=1), world_size=8)])


def test_nobody_is_blamed_where_all_are_at_the_same_place():
    assert hang_cause([hung(0), hung(1), hung(2)]) == (
        "hang: ranks 0-2 have been in the gradient reduction of step 6 for 61 s (megatron/x.py:7): no rank is behind the others"
    )


def test_a_hang_is_read_from_all_ranks_and_another_failure_is_told_as_it_is(tmp_path):
    for record in (hung(0), STUCK, hung(2)):
        write_json(tmp_path / f"failure_rank{record['rank']}.json", record)
    assert cause(tmp_path, first_failure(tmp_path)).startswith("hang: rank 1 ")
    write_json(tmp_path / "failure_rank1.json", {"rank": 1, "time": 10.0, "error": "ValueError", "message": "loss is NaN"})
    assert cause(tmp_path, first_failure(tmp_path)) == "rank 1: ValueError: loss is NaN"
