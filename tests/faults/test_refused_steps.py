"""A loss or gradient that is not finite on one of two ranks, and a loss that stands out, under each policy."""

import json
from pathlib import Path

import pytest
from refused_steps import CASES
from torchrun import launch


@pytest.fixture(scope="session")
def refused(tmp_path_factory):
    """name -> the results of both ranks; all cases in one launch."""
    root = tmp_path_factory.mktemp("refused")
    (root / "cases.json").write_text(json.dumps([case.as_json(root) for case in CASES]))
    launch(Path(__file__).parent / "refused_steps.py", [str(root / "cases.json")], 2)

    def results(name: str) -> list[dict]:
        return [json.loads((root / f"{name}-rank{rank}.json").read_text()) for rank in (0, 1)]

    results.root = root
    return results


def errors(refused, name: str) -> str:
    """The error of a case, which must be the same on both ranks."""
    first, second = (result.get("error") for result in refused(name))
    assert first == second and first is not None, (first, second)
    return first


def trained(refused, name: str) -> list[dict]:
    results = refused(name)
    assert not [result["traceback"] for result in results if "error" in result]
    return results


LOSS = "step 4 (samples 24-31): the loss is nan on rank 1, micro-batch 2 (samples 30-31)"
GRADIENT = "step 4 (samples 24-31): the gradient is infinite on rank 0 before it is reduced"
IN_OWN_SHARD = "step 4 (samples 24-31): the gradient is infinite on rank 1 after it is reduced"
REPLICAS = "step 4 (samples 24-31): the gradient is nan on ranks 0, 1 after it is reduced"


@pytest.mark.parametrize(
    ("name", "words"),
    [("stop_loss", LOSS), ("stop_gradient", GRADIENT), ("stop_in_own_shard", IN_OWN_SHARD), ("stop_replicas", REPLICAS)],
)
def test_every_rank_stops_and_names_step_samples_and_rank(refused, name, words):
    assert errors(refused, name).startswith(f"RefusedStep: {words}; no weight has moved")
    assert all(result["moments"] and result["finite"] for result in refused(name))


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("skip_loss", "twin"),
        ("skip_gradient", "twin"),
        ("skip_overlap", "twin_overlap"),
        ("skip_hybrid", "twin_hybrid"),
        ("spike_skipped", "twin_spike"),
        ("rollback_returns", "twin_rollback"),
    ],
)
def test_the_run_ends_as_its_twin_that_never_saw_the_batch(refused, name, twin):
    for mine, other in zip(trained(refused, name), trained(refused, twin), strict=True):
        assert mine["weights"] and mine["weights"] == other["weights"]
        assert mine["moments"] and mine["finite"]


def test_the_twins_differ_from_each_other(refused):
    weights = [json.dumps(refused(name)[0]["weights"]) for name in ("twin", "twin_rollback", "twin_overlap")]
    assert len(set(weights)) == len(weights)


def test_skipped_steps_are_counted_and_told(refused):
    rows = [json.loads(line) for line in (refused.root / "skip_loss" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("skipped_steps") for row in rows] == [None, None, None, 1, 1, 1]
    logs = [(refused.root / "skip_loss" / "logs" / f"megatron-rank{rank}.log").read_text() for rank in (0, 1)]
    assert f"skipped {LOSS}" in logs[0]


def test_skipping_has_an_end(refused):
    error = errors(refused, "skip_for_ever")
    assert error.startswith("RefusedStep: step 12 ") and "the 10 steps before were skipped too" in error


def test_a_rollback_says_where_it_goes_and_needs_a_checkpoint(refused):
    assert errors(refused, "rollback_leaves") == f"RolledBack: {LOSS}; back to step 2"
    assert errors(refused, "rollback_without_checkpoint") == f"RefusedStep: {LOSS}; there is no checkpoint to go back to"
    rows = [json.loads(line) for line in (refused.root / "rollback" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 5, 6]


def test_rollbacks_to_one_checkpoint_are_counted(refused):
    assert errors(refused, "rollback_too_often_1").endswith("back to step 2")
    assert errors(refused, "rollback_too_often_2").endswith("gone back to step 2 as often as train.max_rollbacks=1 allows")


def test_a_spike_is_noted_and_trained_on_by_default(refused):
    assert trained(refused, "spike_noted")[0]["weights"] != refused("spike_skipped")[0]["weights"]
    log = (refused.root / "spike_noted" / "logs" / "megatron-rank0.log").read_text()
    assert log.count("standard deviations above") == 1 and "note: step 22 (samples 168-175): the loss" in log
