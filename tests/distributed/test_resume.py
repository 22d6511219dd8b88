"""A run that was stopped and started again is the run that was never stopped, also when it starts again in another layout."""

import pytest

RUNS = ["resume_fp32", "resume_bf16", "resume_dp2", "resume_tp2_bf16", "resume_bf16_nvfp4", "resume_tp2_bf16_nvfp4"]
RESHARDED = {
    "reshard_one_to_tp2": "reshard_whole_one",
    "reshard_one_to_pp2": "reshard_whole_one",
    "reshard_one_to_dp2": "reshard_whole_one",
    "reshard_dp2_to_tp2": "reshard_whole_one",
    "reshard_dp2_to_pp2": "reshard_whole_one",
}


@pytest.mark.parametrize("run", RUNS)
def test_resumed_run_ends_with_the_same_bits(results, run):
    keys = ("train_loss", "grad_norm", "learning_rate", "tokens")
    assert results.figures(f"{run}_halves", *keys) == results.figures(f"{run}_whole", *keys)
    for halves, whole in zip(results.results(f"{run}_halves"), results.results(f"{run}_whole"), strict=True):
        assert halves["weights"] and halves["weights"] == whole["weights"]
    assert results.rows(f"{run}_halves")[-1]["val_loss"] == results.rows(f"{run}_whole")[-1]["val_loss"]


@pytest.mark.parametrize("run", RUNS)
def test_the_second_half_really_continued(results, run):
    log = next((results.root / f"{run}_halves" / "logs").glob("megatron-rank0.log")).read_text()
    assert log.count("successfully loaded checkpoint") == 1
    assert results.summary(f"{run}_halves")["status"] == "finished"


@pytest.mark.parametrize("run", ["resume_dp2_halves", "resume_ep2_halves", "reshard_source_dp2"])
def test_runs_of_several_buckets_have_padding_between_them(results, run):
    assert all(result["padded_buckets"] > 0 for result in results.results(run))


@pytest.mark.parametrize(("run", "whole"), RESHARDED.items())
def test_resharded_resume_continues_the_same_run(results, run, whole):
    rows, wanted = results.rows(run), results.rows(whole)[2:]
    assert [row["step"] for row in rows] == [3, 4]
    for row, other in zip(rows, wanted, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5)
        assert row["learning_rate"] == other["learning_rate"]
