"""A run that was stopped and started again is the run that was never stopped, also when it starts again in another layout."""

import pytest

# Stopped and started again, and the same run in one piece.
RUNS = {
    "resume_fp32": "one_plain",
    "resume_bf16": "one_bf16",
    "resume_dp2": "dp2_buckets",
    "resume_tp2_bf16_nvfp4": "tp2_bf16_nvfp4",
}
# What a checkpoint holds does not depend on the layout that wrote it. Pipelines are saved from and loaded into by hybrid and mtp cases.
RESHARDED = ["reshard_one_to_dp2", "reshard_dp2_to_tp2"]


@pytest.mark.parametrize(("run", "in_one"), RUNS.items())
def test_resumed_run_ends_with_the_same_bits(results, run, in_one):
    keys = ("train_loss", "grad_norm", "learning_rate", "tokens")
    assert results.figures(f"{run}_halves", *keys) == results.figures(in_one, *keys)
    for halves, whole in zip(results.results(f"{run}_halves"), results.results(in_one), strict=True):
        assert halves["weights"] and halves["weights"] == whole["weights"]
    assert results.rows(f"{run}_halves")[-1]["val_loss"] == results.rows(in_one)[-1]["val_loss"]


@pytest.mark.parametrize("run", RUNS)
def test_the_second_half_really_continued(results, run):
    folder = results.root / f"{run}_halves"
    log = (folder / "logs" / "megatron-rank0.log").read_text()
    assert log.count(f"successfully loaded checkpoint from {folder / 'checkpoints'}") == 1
    assert results.summary(f"{run}_halves")["status"] == "finished"


@pytest.mark.parametrize("run", ["resume_dp2_halves", "dp2_buckets"])
def test_runs_of_several_buckets_have_padding_between_them(results, run):
    assert all(result["padded_buckets"] > 0 for result in results.results(run))


@pytest.mark.parametrize("run", RESHARDED)
def test_resharded_resume_continues_the_same_run(results, run):
    rows, wanted = results.rows(run), results.rows("one_plain")[2:]
    assert [row["step"] for row in rows] == [3, 4]
    for row, other in zip(rows, wanted, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5)
        assert row["learning_rate"] == other["learning_rate"]
