"""MFU's denominator by hand: every product at the rate of the format it executes in."""

import pytest

from ngpt.config.compose import compose
from ngpt.config.linears import recipes_in_use
from ngpt.config.schema import Config
from ngpt.estimate.counts import training_flops_per_token
from ngpt.estimate.hardware import GPUS
from ngpt.estimate.peak import product_peaks
from ngpt.recipes import Recipe

B200 = GPUS["b200"].rates
WORDS = ["experiment=ngpt_tiny", "train.seq_length=64", "parallel.tensor=2", "cluster.gpus_per_node=2"]


def all_by(executor: str, config: Config) -> dict[Recipe, str]:
    return dict.fromkeys(recipes_in_use(config), executor)


def test_without_quantised_linears_it_is_the_rate_of_the_dtype():
    config = compose([*WORDS, "precision=bf16"])
    assert product_peaks(config, "b200", "bf16", {}) == (pytest.approx(B200["bf16"]), B200["bf16"])


def test_emulated_products_run_in_bf16():
    config = compose([*WORDS, "precision=nvfp4_paper"])
    bf16 = GPUS["h100"].rates["bf16"]
    assert product_peaks(config, "h100", "bf16", all_by("emulated", config)) == (pytest.approx(bf16), bf16)


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_native_products_run_at_their_own_rate(model):
    words = ["precision=nvfp4_paper"]  # all linears of the blocks; the head, attention's scores and routers stay high
    if model == "experts":
        words = ["experiment=ngpt_hybrid_tiny", "model.layer_pattern='E'", "model.num_layers=1", "model.moe_ffn_hidden_size=64", *words]
    config = compose([*WORDS, *words])
    m = config.model
    if model == "dense":
        weights = m.num_layers * 64 * ((2 * m.num_attention_heads + 2 * m.num_query_groups) * m.head_dim + 2 * m.ffn_hidden_size)
    else:
        weights = 2 * 64 * (m.moe_top_k * m.moe_ffn_hidden_size + m.moe_shared_ffn_hidden_size)
    total, low = training_flops_per_token(m, 64), 6 * weights
    assert 0.1 < low / total < 0.99
    wanted = total / (low / B200["nvfp4"] + (total - low) / B200["bf16"])
    weighted, tail = product_peaks(config, "b200", "bf16", all_by("native", config))
    assert weighted == pytest.approx(wanted) and tail == B200["bf16"]


def test_an_unknown_gpu_has_no_peak():
    config = compose(WORDS)
    assert product_peaks(config, None, "bf16", {}) is None
    config = compose([*WORDS, "precision=nvfp4_paper"])
    assert product_peaks(config, "h100", "bf16", all_by("native", config)) is None
