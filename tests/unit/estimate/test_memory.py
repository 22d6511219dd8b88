"""Activations against sums written out from what each module saves, peaks against measured ones, and what changes them."""

from math import prod

import pytest

from ngpt.config import compose
from ngpt.config.schema import Config
from ngpt.estimate.calibration import ROUTING_BYTES, WORKSPACE
from ngpt.estimate.memory import chunk_bytes, chunks_in_flight, estimate_memory
from ngpt.estimate.rank import chunks, tokens

GIB = 2**30
TINY = ["precision=bf16", "train.seq_length=32", "train.micro_batch_size=2", "train.global_batch_size=8"]
HYBRID = ["experiment=ngpt_hybrid_tiny", *TINY]
T = 2 * 32  # tokens of a micro-batch


def bf16(*features: int) -> int:
    return 2 * T * sum(features)


def kept(*overrides: str) -> float:
    cfg = compose([*HYBRID, *overrides])
    (chunk,) = chunks(cfg)
    return chunk_bytes(cfg, chunk, tokens(cfg))


def one_layer(symbol: str, architecture: str, *overrides: str) -> float:
    return kept(f"model.layer_pattern={symbol}", "model.num_layers=1", f"model.architecture={architecture}", *overrides)


# D 64; 4 heads of 16 in 2 groups; MLP 160 in ngpt_tiny, here as configured; router scores of 4 experts.
def test_attention_of_the_control_by_hand():
    x, normed, q, k, v, out = 64, 64, 64, 32, 32, 64
    head = 64 + 64  # the final norm's input and output
    fp32 = 4 * T * (1 + 4)  # the norm's and the softmax's number a row
    assert one_layer("*", "gpt") == bf16(x, normed, q, k, v, out, head) + fp32


def all_but(name: str) -> list[str]:
    return ["precision=nvfp4_paper", f"precision.bf16_modules=['*.{name}']"]


def test_attention_of_ngpt_by_hand():
    h, b, q, k, v, out = 64, 64, 64, 32, 32, 64
    fp32 = 4 * T * (3 + 4 + 4 + 2)  # the residual step; softmax; heads; groups
    high = bf16(h, b, q, k, v, out, q + k + v, 64) + fp32  # queries, keys and values once more, as the projection gave them
    assert one_layer("*", "ngpt") == high
    assert one_layer("*", "ngpt", *all_but("linear_qkv")) == high + bf16(out) + 4 * T  # the fine-grained norm, and its operand


def test_swiglu_mlp_by_hand():
    cfg = compose(["experiment=ngpt_tiny", *TINY, "model.activation=swiglu", "model.layer_pattern=-", "model.num_layers=1"])
    (chunk,) = chunks(cfg)
    h, b, u, activated, head_input = 64, 64, 320, 160, 64
    assert chunk_bytes(cfg, chunk, tokens(cfg)) == bf16(h, b, u, activated, head_input) + 4 * T * 3


def test_experts_by_hand():
    routed = 2 * T  # top 2
    shared = bf16(96, 96)
    control = 2 * routed * (64 + 48 + 48 + 48)  # sent tokens, fc1's output, activation before and after the probabilities
    router = T * ROUTING_BYTES * 4 / 64
    assert one_layer("E", "gpt") == bf16(64, 64, 64 + 64) + 4 * T + control + shared + router
    ngpt = 2 * routed * (64 + 48 + 48 + 64) + 4 * routed * 2  # fc1's output, normalised activation; fc2's output; two fp32 a row
    assert one_layer("E", "ngpt") == bf16(64, 64, 64, 96, 96) + 4 * T * (3 + 1) + ngpt + router


def test_mixer_by_hand():
    in_proj, inner = 128 + 128 + 2 * 2 * 16 + 32, 128
    assert one_layer("M", "gpt") == bf16(64, 64, in_proj, inner, inner, 64 + 64) + 4 * T
    high = bf16(64, 64, in_proj, in_proj, inner, inner, 64) + 4 * T * 3
    assert one_layer("M", "ngpt") == high
    assert one_layer("M", "ngpt", *all_but("in_proj")) == high + bf16(inner) + 4 * T


def measured(experiment: str, micro_batch: int, *overrides: str) -> Config:
    sizes = [f"train.micro_batch_size={micro_batch}", "train.global_batch_size=16", "cluster=h100_1"]
    return compose([f"experiment={experiment}", *sizes, *overrides])


@pytest.mark.parametrize(
    ("experiment", "micro_batch", "gib"),
    [  # torch's peak on one H200, tests/bench/results/step_h200_2026-11-29.md
        ("gpt_1p2b_dense_bf16", 1, 31.54),
        ("gpt_1p2b_dense_bf16", 2, 41.45),
        ("ngpt_1p2b_dense_bf16", 1, 32.47),
        ("ngpt_1p2b_dense_bf16", 2, 43.31),
        ("ngpt_1p2b_dense_nvfp4", 1, 35.61),
        ("ngpt_1p2b_dense_nvfp4", 2, 48.33),
        ("gpt_hybrid_1p5b_bf16", 1, 32.64),
        ("gpt_hybrid_1p5b_bf16", 2, 40.45),
        ("ngpt_hybrid_1p5b_bf16", 1, 33.09),
    ],
)
def test_peaks_are_within_two_percent_of_measured_ones(experiment: str, micro_batch: int, gib: float):
    assert estimate_memory(measured(experiment, micro_batch)).peak / GIB == pytest.approx(gib, rel=0.02)


DENSE = 20 * 2048 * (3072 + 2048 + 6144 + 6144)  # numbers in the linears of ngpt_1p2b_dense
ROWS = ["precision.weight_blocks=1x16", "precision.weight_amax=dynamic_pow2"]
EXPERTS = 8 * 64 * 2 * 1024 * 1024  # of ngpt_hybrid_1p5b


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ([], 2 * DENSE),
        (ROWS, 4 * DENSE),
        (["precision.bf16_modules=['*.mlp.*']"], 2 * 20 * 2048 * (3072 + 2048)),
        (["parallel.tensor=2", "cluster.gpus_per_node=2"], DENSE),
        (["train.global_batch_size=1"], 0),  # one micro-batch a step
        (["cluster.gpu=b200"], 0),  # native
    ],
    ids=["square_blocks", "row_blocks", "attention", "two_ranks", "one_micro_batch", "native"],
)
def test_quantised_weights_of_emulation_are_counted_where_they_are_kept(overrides: list[str], kept: int):
    memory = estimate_memory(measured("ngpt_1p2b_dense_nvfp4", 1, *overrides))
    assert memory.quantized_weights == kept
    assert memory.peak == memory.states.total + kept + memory.activations + memory.temporary + WORKSPACE


@pytest.mark.parametrize("impl", ["grouped", "sequential"])
def test_experts_keep_quantised_weights_however_they_run(impl):
    everything, others = (
        estimate_memory(measured("ngpt_hybrid_1p5b_nvfp4", 1, f"model.expert_impl={impl}", *overrides)).quantized_weights
        for overrides in ([], ["precision.bf16_modules=['*.experts.*']"])
    )
    assert everything - others == 2 * EXPERTS and others > 0


@pytest.mark.parametrize(
    ("precision", "gpu", "impl", "expected"),
    [
        ("mxfp8", "b200", "auto", 2 * (1 + 1 / 32) * EXPERTS),
        ("fp8", "h100", "auto", 2 * EXPERTS),
        ("fp8", "b200", "auto", EXPERTS),
        ("mxfp8", "b200", "sequential", 0),
    ],
)
@pytest.mark.parametrize("batch", [8, 1])
def test_native_experts_keep_their_operands_where_they_run_together(precision, gpu, impl, expected, batch):
    """Of one micro-batch till its backward pass, of several through the step."""
    words = [f"precision={precision}", f"cluster.gpu={gpu}", f"model.expert_impl={impl}", f"train.global_batch_size={batch}"]
    assert estimate_memory(measured("ngpt_hybrid_1p5b_bf16", 1, *words)).quantized_weights == expected


def test_the_peak_of_a_large_vocabulary_is_in_the_output_layer():
    memory = estimate_memory(measured("gpt_1p2b_dense_bf16", 1))
    assert memory.moment == "backward pass of the output layer"
    assert memory.temporary == prod((8192, 131072)) * 2 + prod((2048, 131072)) * 2  # logits or their gradient, and the weight's
    assert memory.peak == memory.states.total + memory.activations + memory.temporary + WORKSPACE


LARGE = ["experiment=ngpt_hybrid_3b30b_bf16", "parallel=ep8", "train.global_batch_size=768"]


def peak(*overrides: str) -> float:
    return estimate_memory(compose([*LARGE, *overrides])).peak


@pytest.mark.parametrize(
    "less",
    [
        ["parallel.recompute=selective"],
        ["parallel.recompute=selective", "parallel.recompute_modules=[shared_experts]"],
        ["parallel.recompute=selective", "parallel.recompute_modules=[moe]"],
        ["parallel.recompute=full", "parallel.recompute_method=block", "parallel.recompute_num_layers=10"],
        ["parallel.recompute=full"],
        ["parallel.tensor=2", "parallel.expert_tensor=1"],
        ["parallel.context=2"],
        ["parallel.pipeline=2", "parallel.expert=4", "model.layer_pattern=MEMEM*EMEMEM*EMEMEM*EMEMEM*EM|EMEM*EMEMEMEM*EMEMEMEME"],
        ["cluster.nodes=2"],
        ["train.seq_length=4096"],
    ],
    ids=" ".join,
)
def test_takes_less_memory(less: list[str]):
    assert peak(*less) < peak()


@pytest.mark.parametrize("more", [["train.micro_batch_size=2"], ["parallel.expert=4"], ["train.seq_length=16384"]], ids=" ".join)
def test_takes_more_memory(more: list[str]):
    assert peak(*more) > peak()


def test_recomputing_more_keeps_less():
    selective, full = ["parallel.recompute=selective", "parallel.recompute_modules=[moe]"], ["parallel.recompute=full"]
    assert kept() > kept(*selective) > kept(*full)
    longer = [*full, "parallel.recompute_num_layers=2"]
    assert kept(*full) > kept(*longer)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches", "expected"),
    [
        (1, None, 8, [1]),
        (4, None, 8, [4, 3, 2, 1]),
        (4, None, 2, [2, 2, 2, 1]),
        (2, 2, 8, [2 + 2 + 1, 2 + 1]),  # 2 * (ranks behind) + ranks * (chunks - 1) + the one at work
    ],
)
def test_micro_batches_in_flight(pipeline: int, virtual: int | None, micro_batches: int, expected: list[int]):
    overrides = [f"parallel.pipeline={pipeline}", f"cluster.gpus_per_node={pipeline}", "model.num_layers=8"]
    overrides += [f"train.global_batch_size={micro_batches}", "train.micro_batch_size=1"]
    overrides += [] if virtual is None else [f"parallel.virtual_pipeline={virtual}"]
    cfg = compose(["experiment=ngpt_tiny", *overrides])
    assert [chunks_in_flight(cfg, rank) for rank in range(pipeline)] == expected
