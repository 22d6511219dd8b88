"""Counts against the sizes of written-out shapes and the published figures."""

from math import prod

import pytest

from ngpt.config import compose
from ngpt.estimate.counts import count_parameters, training_flops_per_token
from ngpt.estimate.hardware import gpu_of_device, peak_flops


def size(*shapes: tuple[int, ...]) -> int:
    return sum(prod(shape) for shape in shapes)


def test_the_dense_model_of_the_paper():
    model = compose(["experiment=ngpt_1p2b_dense_bf16"]).model
    counts = count_parameters(model)
    assert round(counts.blocks / 1e6) == 713
    assert round((counts.embedding + counts.head) / 1e6) == 537
    assert round(training_flops_per_token(model, 8192) / 1e9, 1) == 7.9


def test_the_hybrid_model_of_the_paper():
    """Written out: D 2688; 128 experts of 1856, one of 3712; 32 heads of 128 in 2 groups; 64 Mamba heads of 64, 8 groups of 128."""
    z = x = 64 * 64
    bc, dt = 2 * 8 * 128, 64
    expert = [(1856, 2688), (2688, 1856)]
    mamba = [(z + x + bc + dt, 2688), (x + bc, 4), (x + bc,), (3 * 64,), (2688, x)]  # in_proj, convolution, A_log, D, dt_bias, out_proj
    moe = [*expert * 128, (3712, 2688), (2688, 3712), (128, 2688)]  # experts, shared, router
    attention = [((32 + 2 * 2) * 128, 2688), (2688, 32 * 128)]
    matrices = [*mamba * 23, *moe * 23, *attention * 6, (131072, 2688), (131072, 2688)]
    scales = [*[(2688,), (z + x + bc + dt,)] * 23, *[(2688,), (128, 1856), (3712,)] * 23, *[(2688,), (32 * 128,)] * 6, (131072,)]
    counts = count_parameters(compose(["experiment=ngpt_hybrid_3b30b_bf16"]).model)
    assert counts.total == size(*matrices, *scales)
    assert round(size(*matrices) / 1e7) == round(counts.total / 1e7) == 3158
    assert counts.idle == 23 * 122 * size(*expert, (1856,))
    assert round(counts.active / 1e8) == 36


def test_the_hybrid_control_has_norms_where_ngpt_has_scales():
    counts = {name: count_parameters(compose([f"experiment={name}_hybrid_3b30b_bf16"]).model) for name in ("ngpt", "gpt")}
    scales = 23 * (64 * 64 * 2 + 2 * 8 * 128 + 64) + 23 * (128 * 1856 + 3712) + 6 * 32 * 128 + 131072
    norms = 23 * 64 * 64 + 2688  # the gated norm of each mixer, the final one; the others are as many as the alphas
    assert counts["ngpt"].total - scales == counts["gpt"].total - norms
    assert counts["ngpt"].matmul == counts["gpt"].matmul


# The tiny model: D 64, F 160, 4 heads of 16 in 2 groups, 257 tokens padded to 384, 2 layers.
NGPT_LAYER = [(128, 64), (64, 64), (64,), (64,), (160, 64), (64, 160), (160,), (64,)]  # qkv, proj, sqk, alpha, fc1, fc2, suv, alpha
SWIGLU_LAYER = [(128, 64), (64, 64), (64,), (64,), (320, 64), (64, 160), (320,), (64,)]
GPT_LAYER = [(128, 64), (64, 64), (64,), (160, 64), (64, 160), (64,)]  # qkv, proj, norm, fc1, fc2, norm
TABLE = (384, 64)


@pytest.mark.parametrize(
    ("overrides", "shapes", "padded_rows"),
    [
        (["model=ngpt_tiny"], [*NGPT_LAYER * 2, TABLE, TABLE, (384,)], 64 + 64 + 1),
        (["model=ngpt_tiny", "model.tied_embeddings=true"], [*NGPT_LAYER * 2, TABLE, (384,)], 64 + 1),
        (["model=ngpt_tiny", "model.activation=swiglu"], [*SWIGLU_LAYER * 2, TABLE, TABLE, (384,)], 64 + 64 + 1),
        (["model=gpt_tiny"], [*GPT_LAYER * 2, TABLE, TABLE, (64,)], 64 + 64),
        (["model=gpt_tiny", "model.tied_embeddings=true"], [*GPT_LAYER * 2, TABLE, (64,)], 64),
        (
            ["model=ngpt_tiny", "model.layer_pattern='**-'", "model.num_layers=3"],
            [*NGPT_LAYER, *NGPT_LAYER[:4], TABLE, TABLE, (384,)],
            64 + 64 + 1,
        ),
    ],
    ids=["ngpt", "ngpt_tied", "swiglu", "gpt", "gpt_tied", "two_attentions"],
)
def test_total_is_the_sum_of_the_shapes(overrides: list[str], shapes: list[tuple[int, ...]], padded_rows: int):
    counts = count_parameters(compose(["experiment=ngpt_tiny", *overrides]).model)
    assert counts.total == size(*shapes)
    assert counts.total - counts.total_without_padding == (384 - 257) * padded_rows


@pytest.mark.parametrize("tied", ["true", "false"])
def test_flops_count_each_product_of_a_token(tied: str):
    model = compose(["experiment=ngpt_tiny", f"model.tied_embeddings={tied}"]).model
    seq_length = 32
    layer = 2 * size((128, 64), (64, 64), (160, 64), (64, 160))
    seen = seq_length / 2  # keys that an average causal token attends to
    attention = 2 * 2 * seen * 4 * 16  # scores and the weighted sum, over 4 heads of 16
    forward = 2 * (layer + attention) + 2 * size(TABLE)
    assert training_flops_per_token(model, seq_length) == 3 * forward


def test_flops_of_a_hybrid_count_the_selected_experts_and_the_scan():
    model = compose(["experiment=ngpt_hybrid_tiny", "model.activation=swiglu", "model.layer_pattern=ME", "model.num_layers=2"]).model
    experts = 2 * size((96, 64), (64, 48)) + size((192, 64), (64, 96)) + size((4, 64))  # two selected, the shared one, the router
    mamba = size((128 + 128 + 2 * 2 * 16 + 32, 64), (64, 128))
    # 32 heads of 4, 2 groups of 16, chunks of 16, of which a token sees 8 on average
    scan = 8 * (2 * 2 * 16 + 32 * 2 * 4) + 2 * 32 * 2 * 4 * 16 + 2 * 4 * (128 + 64)
    forward = 2 * (experts + mamba + size(TABLE)) + scan
    assert training_flops_per_token(model, 32) == 3 * forward


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_device_names_find_their_peak(device: str, gpu: str | None):
    assert gpu_of_device(device) == gpu


def test_peak_rates():
    assert peak_flops("h100", "bf16") == 989.4e12
    assert peak_flops(None, "bf16") is None
