import math

import pytest

from ngpt.analysis import compare
from ngpt.analysis.groups import difference, group_runs
from tests.unit.analysis.runs import STEP_SECONDS, TOKENS_PER_STEP, record, write_run


def seeded(path, seed, offset=0.0, steps=(10, 20, 30), **config):
    lines = [record(step, train_loss=step / 10 + offset) for step in steps]
    return write_run(path, lines, config={"train": {"seed": seed}} | config)


def groups_of(*folders):
    return group_runs(compare.load_runs(folders))


def test_runs_that_differ_in_their_seed_alone_are_one_group_wherever_they_stand(tmp_path):
    rate = {"optim": {"lr": 0.5}}
    kinds = {"base": {}, "high": rate}
    folders = [seeded(tmp_path / f"{name}_seed{seed}", seed, **config) for seed in (1, 2) for name, config in kinds.items()]
    found = groups_of(*folders)
    assert [(group.name, group.label, [run.name for run in group.runs]) for group in found] == [
        ("base", "base (2 seeds)", ["base_seed1", "base_seed2"]),
        ("high", "high (2 seeds)", ["high_seed1", "high_seed2"]),
    ]


def test_the_same_seed_twice_is_two_groups(tmp_path):
    assert [group.label for group in groups_of(seeded(tmp_path / "first", 1), seeded(tmp_path / "again", 1))] == ["first", "again"]


def test_a_control_with_another_seed_is_another_group(tmp_path):
    found = groups_of(seeded(tmp_path / "a", 1), seeded(tmp_path / "b", 2, model={"architecture": "gpt"}))
    assert [len(group.runs) for group in found] == [1, 1]


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (("x-s1", "x-s2"), "x"),
        (("x.12", "x.13"), "x"),
        (("runs", "runt"), "run"),  # the s is no word of its own
        (("alpha", "beta"), "alpha"),
        (("1", "2"), "1"),
    ],
)
def test_a_group_has_the_common_part_of_its_names(tmp_path, names, group):
    assert [found.name for found in groups_of(*(seeded(tmp_path / name, seed) for seed, name in enumerate(names)))] == [group]


def test_groups_of_one_name_are_told_apart(tmp_path):
    folders = [seeded(tmp_path / f"x{number}", number, optim={"lr": 0.1 if number < 2 else 0.2}) for number in range(4)]
    assert [group.name for group in groups_of(*folders)] == ["x0", "x2"]


def test_a_group_has_mean_and_extremes_where_every_run_logged(tmp_path):
    (group,) = groups_of(seeded(tmp_path / "a", 1), seeded(tmp_path / "b", 2, 0.5, steps=(10, 15, 30)), seeded(tmp_path / "c", 3, 1.0))
    found = group.series("train_loss")
    assert found.x == [10 * TOKENS_PER_STEP, 30 * TOKENS_PER_STEP]
    assert (found.mean, found.low, found.high) == ([1.5, 3.5], [1.0, 3.0], [2.0, 4.0])


def test_time_of_a_group_is_the_mean_over_its_runs(tmp_path):
    slow = [record(step, step_time_s=3 * STEP_SECONDS) for step in (10, 20)]
    (group,) = groups_of(
        write_run(tmp_path / "a", [record(step) for step in (10, 20)], {"train": {"seed": 1}}),
        write_run(tmp_path / "b", slow, {"train": {"seed": 2}}),
    )
    assert group.series("train_loss", "training_seconds").x == pytest.approx([20 * STEP_SECONDS, 40 * STEP_SECONDS])


def test_one_seed_that_diverged_leaves_a_gap_and_not_the_mean_of_the_others(tmp_path):
    diverged = write_run(tmp_path / "b", [record(10), record(20, train_loss=math.nan)], {"train": {"seed": 2}})
    (group,) = groups_of(write_run(tmp_path / "a", [record(10), record(20)], {"train": {"seed": 1}}), diverged)
    assert [math.isnan(value) for value in group.series("train_loss").mean] == [False, True]


def test_differences_are_from_the_mean_of_the_first_group_at_shared_tokens(tmp_path):
    base = [seeded(tmp_path / f"a{seed}", seed, offset=seed) for seed in (0, 1)]
    other = [seeded(tmp_path / f"b{seed}", seed, offset=2 + seed, steps=(10, 25, 30), optim={"lr": 0.5}) for seed in (0, 1)]
    first, second = groups_of(*base, *other)
    found = difference(second, first, "train_loss")
    assert found.x == [10 * TOKENS_PER_STEP, 30 * TOKENS_PER_STEP]  # 20 and 25 are not of both: nothing is interpolated
    assert (found.mean, found.low, found.high) == ([2.0, 2.0], [1.5, 1.5], [2.5, 2.5])
    relative = difference(second, first, "train_loss", relative=True)
    assert relative.mean == pytest.approx([100 * 2 / 1.5, 100 * 2 / 3.5])


def test_groups_without_a_common_token_count_have_no_difference(tmp_path):
    first, second = groups_of(seeded(tmp_path / "a", 1), seeded(tmp_path / "b", 1, steps=(11, 21)))
    assert len(difference(second, first, "train_loss")) == 0
