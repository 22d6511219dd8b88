"""The report of a sweep: groups of seeds, and final losses worked out by hand. A page of real runs: tests/integration."""

import re

import pytest

from ngpt.analysis.report import write_report
from ngpt.analysis.sweep import member_folders, sweep_groups
from ngpt.config.errors import ConfigError
from ngpt.sweeps import Sweep, SweptRun, write_sweep
from tests.unit.analysis.runs import record, summary, write_run

LOSSES = {"1e-3": [2.0, 2.5, 2.7], "3e-3": [1.9, 2.2, 2.3], "0.1": [5.0, None, 6.0]}


@pytest.fixture
def sweep(tmp_path):
    """Three rates of three seeds; one run is not over, one has logged nothing."""
    members = []
    for rate, losses in LOSSES.items():
        for seed, loss in enumerate(losses, 1):
            name = f"lr={rate}_seed={seed}"
            failed = {"status": "failed", "why": "the disk is full"} if (rate, seed) == ("0.1", 3) else {}
            members.append(SweptRun(name, {"optim.lr": rate, "train.seed": str(seed)}, [], **failed))
            config = {"optim": {"lr": float(rate)}, "train": {"seed": seed}}
            if (rate, seed) != ("0.1", 3):
                found = None if loss is None else summary(val_loss=loss)
                write_run(tmp_path / "s" / name, [record(step) for step in (50, 100)], config, found)
    write_sweep(tmp_path / "s", Sweep("s", [], ["optim.lr", "train.seed"], "ngpt train -m", members))
    return tmp_path / "s"


def test_seeds_are_groups_and_no_mean_is_marked_within_their_noise(sweep):
    title, groups, table = sweep_groups(sweep)
    assert title == "s: optim.lr x train.seed"
    assert [(group.name, len(group.runs)) for group in groups] == [("lr=1e-3", 3), ("lr=3e-3", 3), ("lr=0.1", 2)]
    assert table.keys == ["optim.lr"] and [row.values for row in table.rows] == [["1e-3"], ["3e-3"], ["0.1"]]
    # 0.2667 apart; the t quantile of 4 degrees, 2.776, times the error of the difference, 0.2404, is 0.6674
    assert not any(row.best for row in table.rows)
    # the squared deviations sum to 0.26 and to 0.26 / 3; the error is the root of that / 2 / 3
    assert [(row.loss, row.runs) for row in table.rows[:2]] == [("2.4000 ± 0.2082", "3"), ("2.1333 ± 0.1202", "3")]
    assert (table.rows[2].loss, table.rows[2].runs) == ("5.0000", "1 of 3")  # of those that have come to their end
    assert table.failed == [("lr=0.1_seed=3", "the disk is full")]


def test_the_page_has_a_line_for_each_group_and_a_row_for_each_rate(sweep):
    page = write_report([sweep]).read_text()
    assert "<title>s: optim.lr x train.seed</title>" in page
    assert "lr=1e-3 (3 seeds)" in page and "lr=3e-3 (3 seeds)" in page
    found = re.findall(r"<tr><td[^>]*><div>([13]e-3)</div></td><td[^>]*><div>(\d\.\d{4} ± \d\.\d{4})", page)
    assert found == [("1e-3", "2.4000 ± 0.2082"), ("3e-3", "2.1333 ± 0.1202")]


@pytest.mark.parametrize("same", [True, False])
def test_the_lowest_mean_is_marked_if_all_were_evaluated_on_one_text(same, tmp_path):
    members = []
    for rate, losses in {"1e-3": [2.0, 2.1], "3e-3": [1.0, 1.1]}.items():
        for seed, loss in enumerate(losses):
            members.append(SweptRun(f"{rate}_{seed}", {"optim.lr": rate, "train.seed": str(seed)}, []))
            data = {"valid": [{"path": "x" if same else rate, "weight": 1.0}]}
            write_run(tmp_path / "s" / members[-1].name, None, {"data": data, "train": {"seed": seed}}, summary(val_loss=loss))
    write_sweep(tmp_path / "s", Sweep("s", [], ["optim.lr", "train.seed"], "", members))
    _, _, table = sweep_groups(tmp_path / "s")
    assert [row.best for row in table.rows] == [False, same]


def test_beside_other_runs_a_sweep_stands_for_its_members(sweep, tmp_path):
    assert member_folders(tmp_path / "other") == [tmp_path / "other"]
    assert [path.name for path in member_folders(sweep)] == [f"lr={rate}_seed={seed}" for rate in LOSSES for seed in (1, 2, 3)][:-1]


def test_a_sweep_of_seeds_alone_is_one_group_of_its_name(tmp_path):
    members = [SweptRun(f"seed={seed}", {"train.seed": str(seed)}, []) for seed in (1, 2)]
    for member in members:
        write_run(tmp_path / "s" / member.name, summary=summary())
    write_sweep(tmp_path / "s", Sweep("s", [], ["train.seed"], "", members))
    _, groups, table = sweep_groups(tmp_path / "s")
    assert [(group.name, len(group.runs)) for group in groups] == [("s", 2)] and not table.rows[0].best


def test_a_sweep_without_a_logged_step_has_no_report_yet(tmp_path):
    (tmp_path / "s").mkdir()
    write_sweep(tmp_path / "s", Sweep("s", [], ["train.seed"], "", [SweptRun("seed=1", {"train.seed": "1"}, [])]))
    with pytest.raises(ConfigError, match="no logged step"):
        write_report([tmp_path / "s"])
