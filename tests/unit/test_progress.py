"""Marks of a rank's progress, their order and their words."""

import json

import pytest

from ngpt.progress import (
    BACKWARD,
    BEGIN,
    DATA,
    EVALUATION,
    FORWARD,
    GRADIENTS,
    LOGGING,
    OPTIMIZER,
    SAVE,
    Progress,
    describe,
    in_ranges,
    read_records,
    write_json,
)


def walk(progress: Progress, step: int, microbatches: int):
    """The marks of one step, and the place after each."""
    progress.mark(BEGIN, step)
    yield progress.place
    for _ in range(microbatches):
        progress.begin_pass(DATA, step)
        yield progress.place
        for operation in (FORWARD, BACKWARD):
            progress.mark(operation, step, progress.place.microbatch)
            yield progress.place
    for operation in (GRADIENTS, OPTIMIZER):
        progress.mark(operation)
        yield progress.place
    progress.end_step()
    yield progress.place


def test_every_mark_of_two_steps_is_further_than_the_one_before():
    progress = Progress()
    places = [*walk(progress, 1, 3), *walk(progress, 2, 3)]
    orders = [place.order for place in places]
    assert orders == sorted(orders) and len(set(orders)) == len(orders)
    assert [place.marks for place in places] == list(range(1, len(places) + 1))
    assert progress.steps == 2 and progress.step_time_s is not None


def test_micro_batches_are_counted_by_step_and_by_evaluation():
    progress = Progress()
    microbatches = [place.microbatch for step in (1, 2) for place in walk(progress, step, 2)]
    assert microbatches == [0, 1, 1, 1, 2, 2, 2, 0, 0, 0] * 2
    seen = []
    for _ in range(3):
        progress.begin_pass(EVALUATION, 2)
        seen.append(progress.place.microbatch)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ((FORWARD, 6, 2), "forward of step 6, micro-batch 2"),
        ((GRADIENTS, 6, 0), "the gradient reduction of step 6"),
        ((SAVE, 6, 0), "the save after step 6"),
        ((EVALUATION, 6, 1), "the evaluation after step 6, micro-batch 1"),
        (("start-up", 0, 0), "the start-up"),
        ((LOGGING, 6, 0), "the end of step 6"),
    ],
)
def test_words(place, words):
    assert describe(*place) == words


def test_ranks_are_listed_as_ranges():
    assert in_ranges([3]) == "rank 3"
    assert in_ranges([5, 0, 2, 3, 4, 9, 8]) == "ranks 0, 2-5, 8, 9"


def test_a_damaged_record_is_left_out(tmp_path):
    write_json(tmp_path / "rank0.json", {"rank": 0})
    (tmp_path / "rank1.json").write_text('{"rank": 1')
    (tmp_path / "rank2.json").write_text("[]")
    assert read_records(tmp_path, "rank*.json") == [{"rank": 0}]
    assert json.loads((tmp_path / "rank0.json").read_text()) == {"rank": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0.json", "rank1.json", "rank2.json"]
