"""When experts run in grouped linears: wherever the precision allows it; asked for where it does not, refused by name."""

import pytest

from megatron_ext.precision import policy
from megatron_ext.training.bridge import has_grouped_experts
from ngpt.config import ConfigError, compose
from ngpt.estimate.layout import has_grouped_experts as is_estimated_grouped

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


def test_a_device_whose_kernels_would_multiply_is_refused_and_emulation_is_the_way_out(monkeypatch):
    monkeypatch.setattr(policy.te_recipes, "unavailable", lambda recipe: None)
    with pytest.raises(ConfigError) as caught:
        has_grouped_experts(config(GROUPED, "precision=nvfp4_paper"), TE)
    assert caught.value.path == "model.expert_impl" and "precision.executor=emulated" in caught.value.way_out
    for impl in (GROUPED, AUTO):
        assert has_grouped_experts(config(impl, "precision=nvfp4_paper", "precision.executor=emulated"), TE)
    assert not has_grouped_experts(config(AUTO, "precision=nvfp4_paper"), TE)
    assert not is_estimated_grouped(config(AUTO, "precision=nvfp4_paper", "cluster.gpu=b200", "model.moe_ffn_hidden_size=64"))
