"""Counts of models with multi-token prediction, against written-out shapes."""

from math import prod

import pytest

from ngpt.config import compose
from ngpt.estimate.counts import count_layer, count_parameters, training_flops_per_token

PATTERN = "model.layer_pattern='*-*-/*-/*-'"
# The tiny model: D 64, F 160, 4 heads of 16 in 2 groups, 257 tokens padded to 384.
LAYER = [(128, 64), (64, 64), (160, 64), (64, 160)]  # qkv, proj, fc1, fc2
JOIN, TABLE = (64, 128), (384, 64)
SCALES = [(64,), (64,), (160,), (64,)]  # sqk, alpha, suv, alpha
NORMS = [(64,)] * 5  # before attention and MLP; of the embedding, of the hidden state, of what leaves the depth


def size(*shapes: tuple[int, ...]) -> int:
    return sum(prod(shape) for shape in shapes)


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize(("model", "others"), [("ngpt_tiny", SCALES), ("gpt_tiny", NORMS)])
def test_a_depth_adds_its_projection_its_layers_and_its_norms(model: str, others: list[tuple[int, ...]], tied: str):
    overrides = ["experiment=ngpt_tiny", f"model={model}", f"model.tied_embeddings={tied}"]
    plain, deep = (count_parameters(compose([*overrides, *more]).model) for more in ([], [PATTERN]))
    assert deep.prediction == deep.total - plain.total == 2 * size(*LAYER, JOIN, *others)
    assert deep.blocks == plain.blocks and deep.padding == plain.padding
    assert deep.matmul - plain.matmul == 2 * size(*LAYER, JOIN, TABLE)  # the head works once more for each depth


def test_flops_count_the_products_of_every_depth():
    model = compose(["experiment=ngpt_tiny", PATTERN]).model
    attention = 2 * 2 * (32 / 2) * 4 * 16  # scores and the weighted sum, over half of 32 tokens, 4 heads of 16
    forward = 4 * (2 * size(*LAYER) + attention) + 2 * 2 * size(JOIN) + 3 * 2 * size(TABLE)
    assert training_flops_per_token(model, 32) == 3 * forward


def test_experts_of_a_depth_that_a_token_does_not_see_are_idle():
    plain, deep = (compose(["experiment=ngpt_hybrid_tiny", f"model.layer_pattern='{pattern}'"]).model for pattern in ("ME*E-", "ME*E-/ME"))
    experts = count_layer(deep, "E")
    assert count_parameters(deep).idle == 3 * experts.idle == count_parameters(plain).idle + experts.idle > 0
    assert count_parameters(deep).layers["E"] == 2 * experts.total
    assert count_parameters(deep).prediction == size(JOIN) + experts.total + count_layer(deep, "M").total
