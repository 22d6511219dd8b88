"""What a rank holds: parameters summed over ranks give the model's, and the bytes are those of Megatron's buffers."""

import pytest

from ngpt.config import compose
from ngpt.config.schema import Config
from ngpt.config.sizes import expert_tensor_size, padded_vocab_size
from ngpt.estimate.counts import count_parameters
from ngpt.estimate.rank import chunks_by_rank
from ngpt.estimate.states import RankParameters, rank_parameters, state_bytes

HYBRID = ["experiment=ngpt_hybrid_tiny", "train.global_batch_size=8"]
DENSE = ["experiment=ngpt_tiny", "train.global_batch_size=8"]
CUT = "model.layer_pattern=ME*|EM"


def held_by_ranks(cfg: Config) -> list[RankParameters]:
    return [rank_parameters(cfg, held) for held in chunks_by_rank(cfg)]


def parameters_of_all_ranks(cfg: Config) -> int:
    """One copy of the model: sharded parts once for each rank that has one, replicated ones once."""
    total = 0
    for held in held_by_ranks(cfg):
        total += (held.dense + held.dense_scales - held.replicated) * cfg.parallel.tensor + held.replicated
        total += (held.experts + held.expert_scales) * cfg.parallel.expert * expert_tensor_size(cfg)
    return total


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ([*DENSE, "parallel.tensor=2"], 2),
        ([*DENSE, "parallel.tensor=2", "model.activation=swiglu", "model.architecture=gpt"], 4),
        ([*DENSE, "parallel.pipeline=2"], 2),
        ([*DENSE, "parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.num_layers=4"], 2),
        ([*HYBRID, "parallel.tensor=2"], 2),
        ([*HYBRID, "parallel.expert=2"], 2),
        ([*HYBRID, "parallel.tensor=2", "parallel.expert=2"], 4),
        ([*HYBRID, "parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=1"], 4),
        ([*HYBRID, "parallel.tensor=2", "model.moe_suv=shared"], 2),
        ([*HYBRID, "parallel.tensor=2", "parallel.expert_tensor=1", "model.moe_suv=shared"], 2),
        ([*HYBRID, "parallel.pipeline=2", CUT, "model.num_layers=5"], 2),
        ([*HYBRID, "parallel.pipeline=2", "parallel.tensor=2", "parallel.expert=2", CUT, "model.num_layers=5"], 8),
        ([*HYBRID, "model.layer_pattern=ME*/*E/*E", "model.num_layers=3", "parallel.tensor=2"], 2),
        ([*HYBRID, "model.layer_pattern=ME*/*E", "model.num_layers=3", "model.architecture=gpt", "model.tied_embeddings=true"], 1),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else None,
)
def test_ranks_together_hold_one_model(overrides: list[str], gpus: int):
    cfg = compose([*overrides, f"cluster.gpus_per_node={gpus}"])
    assert parameters_of_all_ranks(cfg) == count_parameters(cfg.model).total


@pytest.mark.parametrize(("pattern", "copies"), [("ME*|EM", 1), ("ME*|EM/*E", 1)])
def test_a_tied_table_is_held_again_by_the_last_stage_once(pattern: str, copies: int):
    tied = ["model.tied_embeddings=true", "parallel.pipeline=2", "cluster.gpus_per_node=2", f"model.layer_pattern={pattern}"]
    cfg = compose([*HYBRID, *tied, "model.num_layers=5"])
    table = padded_vocab_size(cfg.model) * cfg.model.hidden_size
    assert parameters_of_all_ranks(cfg) == count_parameters(cfg.model).total + copies * table


# The tiny hybrid: D 64; M: 32 heads of 4, 2 groups of 16; E: 4 experts of 48, a shared one of 96; *: 4 heads of 16 in 2 groups.
def test_an_expert_layer_of_one_rank_by_hand():
    overrides = ["parallel.tensor=2", "parallel.expert=2", "cluster.gpus_per_node=4", "model.layer_pattern=E", "model.num_layers=1"]
    cfg = compose([*HYBRID, *overrides])
    (held,) = held_by_ranks(cfg)
    table = 384 // 2 * 64
    assert held.experts == 2 * (24 * 64 + 64 * 24)  # two experts, cut over two ranks
    assert held.expert_scales == 2 * 24  # suv
    assert held.dense == 2 * table + 48 * 64 + 64 * 48 + 4 * 64  # embedding and head; the shared expert's half; the router
    assert held.dense_scales == 192 + 48 + 64  # sz, the shared expert's suv, alpha
    assert held.replicated == 4 * 64 + 64


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["precision=bf16"], (2 * 100 + 4 * 10, 4 * 110, 12 * 100 + 8 * 10)),
        (["precision=bf16", "precision.grad_reduce_in_fp32=false"], (240, 2 * 100 + 4 * 10, 1280)),
        (["precision=bf16", "cluster.gpus_per_node=4"], (240, 440, (1200 + 80) / 4)),
        (["precision=bf16", "cluster.gpus_per_node=4", "parallel.context=2"], (240, 440, (1200 + 80) / 4)),
        (["precision=bf16", "cluster.gpus_per_node=4", "parallel.tensor=2"], (240, 440, (1200 + 80) / 2)),
        (["precision=fp32"], (4 * 110, 4 * 110, 8 * 110)),
        (["precision=fp32", "parallel.distributed_optimizer=false", "cluster.gpus_per_node=4"], (440, 440, 880)),
    ],
)
def test_bytes_of_a_hundred_weights_and_ten_scales(overrides: list[str], expected: tuple[float, float, float]):
    states = state_bytes(compose([*DENSE, *overrides]), RankParameters(dense=100, dense_scales=10))
    assert (states.weights, states.gradients, states.optimizer) == expected


def test_state_of_experts_is_split_over_those_with_the_same_experts():
    cfg = compose([*HYBRID, "precision=bf16", "cluster.gpus_per_node=4", "parallel.expert=2"])
    assert state_bytes(cfg, RankParameters(experts=100)).optimizer == 12 * 100 / 2
    assert state_bytes(cfg, RankParameters(dense=100)).optimizer == 12 * 100 / 4
