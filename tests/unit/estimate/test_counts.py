"""Counts against the sizes of written-out shapes and the published figures."""

from math import prod

import pytest

from ngpt.config import compose
from ngpt.estimate.counts import count_parameters, training_flops_per_token
from ngpt.estimate.peaks import gpu_of_device, peak_flops


def size(*shapes: tuple[int, ...]) -> int:
    return sum(prod(shape) for shape in shapes)


def test_the_dense_model_of_the_paper():
    model = compose(["experiment=ngpt_1p2b_dense_bf16"]).model
    counts = count_parameters(model)
    assert round(counts.blocks / 1e6) == 713
    assert round((counts.embedding + counts.head) / 1e6) == 537
    assert round(training_flops_per_token(model, 8192) / 1e9, 1) == 7.9


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
