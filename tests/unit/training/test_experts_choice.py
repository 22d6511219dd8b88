"""When experts run in grouped linears: wherever the precision allows it; asked for where it does not, refused by name."""

import pytest

from megatron_ext.precision import policy
from megatron_ext.training.bridge import has_grouped_experts
from megatron_ext.training.summary import hybrid_lines
from ngpt.config import ConfigError, compose
from ngpt.estimate.rank import has_grouped_experts as is_estimated_grouped

TE = "transformer_engine"
GROUPED, SEQUENTIAL, AUTO = (f"model.expert_impl={impl}" for impl in ("grouped", "sequential", "auto"))


def config(*overrides: str):
    return compose(["experiment=ngpt_hybrid_tiny", "cluster.gpu=h100", *overrides])


@pytest.mark.parametrize(
    ("overrides", "grouped"),
    [
        ([AUTO, "precision=bf16"], True),
        ([AUTO, "precision=nvfp4_paper"], True),
        ([AUTO, "precision=nvfp4_static"], True),
        ([AUTO, "precision=nvfp4_paper", "precision.grad_output_amax=dynamic"], False),
        ([AUTO, "precision=nvfp4_nvidia"], False),
        ([AUTO, "precision=bf16", "model.moe_ffn_hidden_size=36"], False),
        ([SEQUENTIAL, "precision=bf16"], False),
        ([SEQUENTIAL, "precision=nvfp4_paper"], False),
        ([GROUPED, "precision=bf16"], True),
        ([GROUPED, "precision=nvfp4_paper", "precision.executor=emulated"], True),
        ([GROUPED, "precision=nvfp4_static", "precision.executor=emulated"], True),
    ],
    ids=str,
)
def test_every_backend_and_the_estimate_choose_alike(overrides, grouped):
    cfg = config(*overrides)
    assert has_grouped_experts(cfg, TE) is has_grouped_experts(cfg, "local") is is_estimated_grouped(cfg) is grouped


@pytest.mark.parametrize("impl", [GROUPED, AUTO])
@pytest.mark.parametrize("precision", ["nvfp4_paper", "nvfp4_static", "nvfp4_nvidia", "fp8", "mxfp8"])
def test_native_kernels_take_the_experts_of_a_rank_together_under_every_recipe(precision, impl, monkeypatch):
    monkeypatch.setattr(policy.te_recipes, "unavailable", lambda recipe: None)
    cfg = config(impl, f"precision={precision}", "cluster.gpu=b200", "model.moe_ffn_hidden_size=64")
    assert has_grouped_experts(cfg, TE) and is_estimated_grouped(cfg)
    assert hybrid_lines(cfg, TE)[0].startswith("  experts grouped, ")


def test_a_run_on_another_device_than_the_config_names_goes_by_the_device(monkeypatch):
    words = ["precision=nvfp4_nvidia", "cluster.gpu=b200", "model.moe_ffn_hidden_size=64"]
    monkeypatch.setattr(policy.te_recipes, "unavailable", lambda recipe: "not here")
    assert not has_grouped_experts(config(AUTO, *words), TE)
    with pytest.raises(ConfigError) as caught:
        has_grouped_experts(config(GROUPED, *words), TE)
    assert caught.value.path == "model.expert_impl" and "precision=nvfp4_nvidia has input dynamic amax" in caught.value.rule
    monkeypatch.setattr(policy.te_recipes, "unavailable", lambda recipe: None)
    assert has_grouped_experts(config(AUTO, "precision=nvfp4_nvidia"), TE)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([AUTO, "precision=nvfp4_nvidia"], "one by one (Emulated experts are quantised together under static input and weight"),
        ([AUTO, "precision=bf16", "model.moe_ffn_hidden_size=36"], "one by one (A grouped product takes rows of multiples of 8"),
        ([SEQUENTIAL, "precision=bf16"], "one by one (model.expert_impl=sequential)"),
        ([AUTO, "precision=nvfp4_paper"], "grouped, tokens by alltoall"),
    ],
    ids=str,
)
def test_the_header_says_why_experts_run_one_by_one(overrides, reason):
    assert reason in hybrid_lines(config(*overrides), "local")[0]


@pytest.mark.parametrize(("gpu", "reason", "grouped"), [("h100", "no kernels", False), ("b200", None, True)])
def test_experts_kept_in_bf16_are_grouped_as_their_recipe_would_be(gpu, reason, grouped, monkeypatch):
    """So that no parameter changes with the blocks that are kept in bf16."""
    monkeypatch.setattr(policy.te_recipes, "unavailable", lambda recipe: reason)
    kept = ["precision=nvfp4_nvidia", "precision.bf16_modules=['*.experts.*']", "model.moe_ffn_hidden_size=64"]
    cfg = config(AUTO, *kept, f"cluster.gpu={gpu}")
    assert is_estimated_grouped(cfg) is has_grouped_experts(cfg, TE) is grouped
