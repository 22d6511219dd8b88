"""Optimizer state over several gradient buckets with padding between them: saved, resumed and cut anew, it stays the same run.

Also what was written before the state was saved by rows (`megatron_ext/compat/distrib_optimizer_rows.py`): with Megatron's own code, which
takes the state behind the first padded bucket from the wrong place.
"""

import pytest
from cases import BF16, BUCKETS, DP2, OVERLAP, SAVE, TP2, Case, _seed
from hybrid_cases import EP2
from results import Results

DP3 = ["cluster.gpus_per_node=3", "train.global_batch_size=6"]
# Matrices that do not fill gradient buckets evenly, those of experts among them.
UNEVEN = ["model.moe_ffn_hidden_size=49", "model.moe_shared_ffn_hidden_size=97"]
HALF = [*SAVE, "train.stop_after=2"]
UPSTREAM = {"upstream_state": True}
RESUMED = {
    2: {
        "dense": ("plain", [DP2, BUCKETS, BF16, ["model.ffn_hidden_size=161"]]),
        "dense_control": ("control", [DP2, BUCKETS]),
        "dense_gather_at_once": ("plain", [DP2, BUCKETS, ["parallel.overlap_param_gather=false"]]),
        "hybrid": ("hybrid_gated", [DP2, BUCKETS, BF16, UNEVEN]),
        "hybrid_control": ("hybrid_control", [DP2, BUCKETS]),
        "hybrid_experts": ("hybrid_gated", [EP2, BUCKETS]),
    },
    3: {
        "dense_dp3": ("plain", [DP3, BUCKETS]),
        "dense_control_dp3": ("control", [DP3, BUCKETS, BF16]),
        "hybrid_dp3": ("hybrid_gated", [DP3, BUCKETS]),
        "hybrid_control_dp3": ("hybrid_control", [DP3, BUCKETS, BF16]),
    },
}
SOURCES = {"dp2": [DP2, BUCKETS], "tp2": [TP2, BUCKETS]}
MODELS = ("gated", "hybrid_gated")


def _resumed(processes: int) -> list[Case]:
    """Runs of 4 steps, and the same runs stopped after step 2 and started again."""
    found = []
    for name, (model, groups) in RESUMED[processes].items():
        words = [*SAVE, *(item for group in groups for item in group)]
        halves = [*words, f"run.name={name}_halves"]
        found += [
            Case(f"{name}_whole", model, words),
            Case(f"{name}_halves_1", model, [*halves, "train.stop_after=2"]),
            Case(f"{name}_halves_2", model, halves),
        ]
    return found


def _half(name: str, model: str, *groups: list[str], **more: object) -> Case:
    return Case(name, model, [*HALF, *(item for group in groups for item in group)], **more)


ONE_PROCESS_FIRST = [
    *(_seed(model) for model in MODELS),
    *(Case(f"uncut_{model}", model, seed=f"seed_{model}") for model in MODELS),
]
TWO_PROCESSES = [
    *_resumed(2),
    *(_half(f"{source}_{model}", model, *groups, seed=f"seed_{model}") for source, groups in SOURCES.items() for model in MODELS),
    # By Megatron's own code, one bucket a buffer: right.
    Case("old_one_bucket_whole", "hybrid_gated", [*DP2, *OVERLAP, *SAVE]),
    _half("old_one_bucket_halves_1", "hybrid_gated", DP2, OVERLAP, ["run.name=old_one_bucket_halves"], options=UPSTREAM),
    Case("old_one_bucket_halves_2", "hybrid_gated", [*DP2, *OVERLAP, *SAVE, "run.name=old_one_bucket_halves"]),
    # Several buckets: wrong.
    _half("old_fp32_1", "plain", DP2, BUCKETS, ["run.name=old_fp32"], options=UPSTREAM),
    Case("old_fp32_2", "plain", [*DP2, *BUCKETS, "run.name=old_fp32"]),
    _half("old_bf16_1", "control", DP2, BUCKETS, BF16, ["run.name=old_bf16"], options=UPSTREAM),
    Case("old_bf16_2", "control", [*DP2, *BUCKETS, *BF16, "run.name=old_bf16"]),
    Case("old_bf16_into_fp32", "control", DP2, load_all="old_bf16"),
    Case("old_weights_alone", "plain", DP2, seed="old_fp32"),
]  # fmt: skip
THREE_PROCESSES = _resumed(3)
ONE_PROCESS_LAST = [Case(f"{source}_{model}_to_one", model, load_all=f"{source}_{model}") for source in SOURCES for model in MODELS]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    found = Results(tmp_path_factory.mktemp("buckets"))
    for cases, processes in ((ONE_PROCESS_FIRST, 1), (TWO_PROCESSES, 2), (THREE_PROCESSES, 3), (ONE_PROCESS_LAST, 1)):
        found.run(cases, processes)
    return found


@pytest.mark.parametrize("run", [name for runs in RESUMED.values() for name in runs])
def test_a_run_of_padded_buckets_resumes_to_the_same_bits(results, run):
    keys = ("train_loss", "grad_norm", "learning_rate", "tokens")
    assert results.figures(f"{run}_halves", *keys) == results.figures(f"{run}_whole", *keys)
    for halves, whole in zip(results.results(f"{run}_halves"), results.results(f"{run}_whole"), strict=True):
        assert halves["weights"] and halves["weights"] == whole["weights"]
        assert halves["padded_buckets"] > 0


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("source", SOURCES)
def test_padded_buckets_go_on_in_one_process_as_the_run_that_was_never_cut(results, source, model):
    assert all(result["padded_buckets"] > 0 for result in results.results(f"{source}_{model}"))
    rows, wanted = results.rows(f"{source}_{model}_to_one"), results.rows(f"uncut_{model}")[2:]
    assert [row["step"] for row in rows] == [3, 4]
    for row, other in zip(rows, wanted, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5)


def test_an_old_checkpoint_of_one_bucket_resumes_to_the_same_bits(results):
    keys = ("train_loss", "grad_norm")
    assert results.figures("old_one_bucket_halves", *keys) == results.figures("old_one_bucket_whole", *keys)
    for halves, whole in zip(results.results("old_one_bucket_halves"), results.results("old_one_bucket_whole"), strict=True):
        assert halves["weights"] == whole["weights"]


@pytest.mark.parametrize("run", ["old_fp32", "old_bf16", "old_bf16_into_fp32"])
def test_an_old_checkpoint_of_padded_buckets_is_refused_on_every_rank_with_the_way_out(results, run):
    for result in results.results(run):
        assert result["error"].startswith("ConfigError: checkpoint:"), result["error"]
        assert "padded gradient bucket" in result["error"] and "run.name=NEW checkpoint.load=" in result["error"]


def test_the_weights_of_a_refused_checkpoint_start_a_new_run(results):
    assert [row["step"] for row in results.rows("old_weights_alone")] == [1, 2, 3, 4]
