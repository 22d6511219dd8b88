"""Kernels and collectives against hand-made bytes and FLOPs, steps against measured ones, and what changes them."""

import pytest

from ngpt.config import compose
from ngpt.config.schema import Config
from ngpt.estimate.calibration import (
    ATTENTION_BACKWARD_FRACTION,
    ATTENTION_FORWARD_FRACTION,
    COLLECTIVE_LATENCY_S,
    LINK_FRACTION,
    NATIVE_EXPERT_LINEAR_S,
    STEP_BAND,
)
from ngpt.estimate.collectives import exchange_seconds, gather_seconds, nvlink_domain
from ngpt.estimate.counts import training_flops_per_token
from ngpt.estimate.hardware import GPUS
from ngpt.estimate.kernels import layer_work
from ngpt.estimate.links import layer_links
from ngpt.estimate.rank import chunks, tokens
from ngpt.estimate.step_time import estimate_step

DENSE = ["experiment=ngpt_1p2b_dense_bf16", "train.global_batch_size=16", "train.micro_batch_size=2"]  # which does not wait for the host
HYBRID = ["experiment=ngpt_hybrid_3b30b_bf16", "parallel=ep8", "train.global_batch_size=768"]


def step_seconds(*overrides: str) -> float:
    return estimate_step(compose(overrides)).total


@pytest.mark.parametrize(
    ("experiment", "micro_batch", "tokens_per_second"),
    [  # one H200, tests/bench/results/step_h200_2026-11-29.md
        ("gpt_1p2b_dense_bf16", 1, 62_500),
        ("gpt_1p2b_dense_bf16", 2, 67_100),
        ("ngpt_1p2b_dense_bf16", 1, 61_700),
        ("ngpt_1p2b_dense_bf16", 2, 65_200),
        ("ngpt_1p2b_dense_nvfp4", 1, 59_100),
        ("ngpt_1p2b_dense_nvfp4", 2, 61_400),
        ("gpt_hybrid_1p5b_bf16", 1, 51_300),
        ("gpt_hybrid_1p5b_bf16", 2, 98_700),
        ("ngpt_hybrid_1p5b_bf16", 1, 55_000),
        ("ngpt_hybrid_1p5b_bf16", 1, 47_600),
        ("ngpt_hybrid_1p5b_bf16", 2, 102_500),
    ],
)
def test_measured_steps_are_within_the_band_that_is_printed(experiment: str, micro_batch: int, tokens_per_second: float):
    sizes = [f"train.micro_batch_size={micro_batch}", "train.global_batch_size=8", "cluster=h100_1", "cluster.gpu=h200"]
    step = estimate_step(compose([f"experiment={experiment}", *sizes]))
    low, high = STEP_BAND
    assert low <= round(step.tokens_per_second / tokens_per_second, 2) <= high


def test_emulation_costs_what_was_measured_beside_bf16():
    """139 and 133 ms of a micro-batch on one H200, in one run; the norms that NVFP4 brings back included."""
    sizes = ["train.micro_batch_size=1", "train.global_batch_size=8", "cluster=h100_1", "cluster.gpu=h200"]
    rates = [estimate_step(compose([f"experiment=ngpt_1p2b_dense_{name}", *sizes])).tokens_per_second for name in ("bf16", "nvfp4")]
    assert rates[0] / rates[1] == pytest.approx(139 / 133, rel=0.03)


def test_attention_flops_are_those_of_the_count():
    """Seconds times rate: twice the forward's FLOPs backward, half the sequence seen; over all layers what MFU counts for attention."""
    cfg = compose([*DENSE, "cluster=h100_1"])
    (chunk,) = chunks(cfg)
    works = [layer_work(cfg, layer, tokens(cfg)) for layer in chunk.layers]
    rate = GPUS["h100"].rates["bf16"]
    forward = sum(work.attention for work, _ in works) * rate * ATTENTION_FORWARD_FRACTION
    backward = sum(work.attention for _, work in works) * rate * ATTENTION_BACKWARD_FRACTION
    longer, shorter = (training_flops_per_token(cfg.model, length) for length in (8192, 4096))
    assert forward + backward == pytest.approx(2 * 8192 * 2 * (longer - shorter))  # of two sequences
    assert backward == pytest.approx(2 * forward)


def test_nothing_is_faster_than_the_peak():
    for overrides in (DENSE, HYBRID):
        cfg = compose(overrides)
        step = estimate_step(cfg)
        peak = GPUS[cfg.cluster.gpu or "h100"].rates["bf16"] * step.processes
        assert step.tokens_per_second * training_flops_per_token(cfg.model, cfg.train.seq_length) < 0.7 * peak


@pytest.mark.parametrize(
    ("slower", "than"),
    [
        ([*DENSE, "cluster=h100_1", "parallel.recompute=full"], [*DENSE, "cluster=h100_1"]),
        ([*DENSE, "cluster=h100_1", "parallel.recompute=selective"], [*DENSE, "cluster=h100_1"]),
        ([*DENSE, "cluster=h100_1"], [*DENSE, "cluster=h100_1", "cluster.gpu=b200"]),
        ([*DENSE, "cluster=h100_1"], [*DENSE, "cluster=h100_1", "cluster.gpu=h200"]),
        ([*DENSE, "cluster=h100_1"], [*DENSE, "cluster=h100_8"]),
        ([*DENSE, "cluster=h100_1"], [*DENSE, "cluster=h100_1", "model.architecture=gpt"]),
        (
            [*DENSE, "cluster=h100_8", "parallel.tensor=8", "model.num_query_groups=8"],
            [*DENSE, "cluster=h100_8", "model.num_query_groups=8"],
        ),
        ([*DENSE, "cluster=h100_8", "parallel=dp"], [*DENSE, "cluster=h100_8", "parallel=dp_overlap"]),
        (
            [*DENSE, "cluster=h100_8", "parallel.pipeline=4"],
            [*DENSE, "cluster=h100_8", "parallel.pipeline=2"],
        ),
        ([*HYBRID, "parallel.expert=8", "cluster.nodes=8", "cluster.gpus_per_node=1"], [*HYBRID, "parallel.expert=8"]),
        ([*HYBRID, "model.expert_impl=sequential"], HYBRID),
        ([*HYBRID, "parallel.recompute=selective", "parallel.recompute_modules=[moe]"], HYBRID),
    ],
    ids=lambda overrides: " ".join(overrides[3:]),
)
def test_is_slower(slower: list[str], than: list[str]):
    assert step_seconds(*slower) > step_seconds(*than)


@pytest.mark.parametrize("precision", ["fp8", "mxfp8", "nvfp4_paper", "nvfp4_nvidia"])
def test_native_experts_wait_for_the_host_far_less_together_than_one_by_one(precision):
    words = [*HYBRID, f"precision={precision}", "cluster.gpu=b200"]
    together, alone = (estimate_step(compose([*words, f"model.expert_impl={impl}"])) for impl in ("auto", "sequential"))
    assert together.stage.work.host < 0.5 * alone.stage.work.host
    assert estimate_step(compose([*words, "model.expert_impl=grouped"])) == together


def test_host_time_of_native_experts_by_hand():
    """Both linears of each of a rank's 16 experts in 23 layers, beside the one product of BF16."""
    plain, native = (
        estimate_step(compose([*HYBRID, f"precision={precision}", "cluster.gpu=b200"])).stage.work.host for precision in ("bf16", "mxfp8")
    )
    assert native - plain == pytest.approx(23 * 16 * 2 * NATIVE_EXPERT_LINEAR_S)


def test_routed_experts_alone_have_no_dense_tensor_collectives():
    """Without a shared expert, tokens reach whole experts on their own ranks through nothing."""
    words = ["experiment=ngpt_hybrid_tiny", "parallel.tensor=2", "parallel.expert_tensor=1", "cluster.gpus_per_node=2"]
    words += ["model.layer_pattern=E", "model.num_layers=1", "model.architecture=gpt"]
    links = []
    for shared in (96, 0):
        cfg = compose([*words, f"model.moe_shared_ffn_hidden_size={shared}"])
        (layer,) = chunks(cfg)[0].layers
        links.append(layer_links(cfg, layer, tokens(cfg)))
        gathered = 2 * gather_seconds(cfg, tokens(cfg).inner * 64 * 4, 2)
    assert links == [(gathered, gathered / 2), (0, 0)]


@pytest.mark.parametrize(("sequence_parallel", "exposed"), [("true", 1), ("false", 2)])
def test_backward_exposes_the_gather_of_the_output_gradient_alone(sequence_parallel: str, exposed: int):
    """Scatters of qkv's and fc1's input gradient ran behind wgrad in a trace of two GPUs; an all-reduce was not traced."""
    cfg = compose([*DENSE, "cluster=h100_8", "parallel.tensor=2", f"parallel.sequence_parallel={sequence_parallel}"])
    gathered = gather_seconds(cfg, tokens(cfg).inner * cfg.model.hidden_size * 2, 2)
    for layer in chunks(cfg)[0].layers:
        assert layer_links(cfg, layer, tokens(cfg)) == (2 * gathered, exposed * gathered)


def test_recomputed_experts_send_their_tokens_again():
    plain, again = (
        estimate_step(compose([*HYBRID, *recompute])).stage.links
        for recompute in ([], ["parallel.recompute=selective", "parallel.recompute_modules=[moe]"])
    )
    assert again == pytest.approx(1.5 * plain)  # forward and backward exchange equally much


def test_virtual_pipelining_shrinks_the_bubble():
    whole, virtual = (
        estimate_step(compose([*DENSE, "cluster=h100_8", "parallel.pipeline=2", f"parallel.virtual_pipeline={chunks_each}"]))
        for chunks_each in ("null", "2")
    )
    assert whole.bubble == whole.stage.total  # one of two ranks waits for one micro-batch in all
    assert virtual.bubble == virtual.stage.total / 2


def test_nvfp4_is_faster_than_bf16_where_it_is_native():
    large = [*DENSE, "cluster=h100_1", "cluster.gpu=b200", "model.hidden_size=8192", "model.ffn_hidden_size=24576"]
    seconds = [estimate_step(compose([*large, f"precision={name}"])).stage.work.products for name in ("nvfp4_paper", "fp8", "bf16")]
    assert seconds == sorted(seconds)


def on(gpus_per_node: int, nodes: int = 1, gpu: str = "h100") -> Config:
    return compose(["experiment=ngpt_tiny", "train.global_batch_size=1024", f"cluster.gpu={gpu}", *_cluster(gpus_per_node, nodes)])


def _cluster(gpus_per_node: int, nodes: int) -> list[str]:
    return [f"cluster.gpus_per_node={gpus_per_node}", f"cluster.nodes={nodes}"]


GB = 1e9


@pytest.mark.parametrize(
    ("cfg", "size", "stride", "rate"),
    [
        (on(8), 8, 1, 450e9),  # within a host: NVLink
        (on(8, 4), 4, 8, 50e9),  # one rank of each host: its adapter
        (on(8, 4), 32, 1, 400e9),  # whole hosts: eight adapters
        (on(8, 4), 16, 2, 200e9),  # four ranks of each host
        (on(4, 16, "gb200"), 64, 1, 900e9),  # one NVLink domain over 16 hosts
    ],
)
def test_a_gather_takes_the_slowest_link(cfg: Config, size: int, stride: int, rate: float):
    expected = GB * (size - 1) / size / (rate * LINK_FRACTION) + COLLECTIVE_LATENCY_S
    assert gather_seconds(cfg, GB, size, stride) == pytest.approx(expected)
    assert gather_seconds(cfg, GB, 1, stride) == 0


def test_an_exchange_sends_most_over_the_network():
    within = exchange_seconds(on(8), GB, 8)
    assert within == pytest.approx(GB * 7 / 8 / (450e9 * LINK_FRACTION) + COLLECTIVE_LATENCY_S)
    between = exchange_seconds(on(8, 2), GB, 16)
    assert between == pytest.approx(GB / 2 / (50e9 * LINK_FRACTION) + COLLECTIVE_LATENCY_S)


def test_nvlink_reaches_as_far_as_the_host_or_the_rack():
    assert nvlink_domain(on(4)) == 4
    assert nvlink_domain(on(8, 2)) == 8
    assert nvlink_domain(on(4, 2, "gb300")) == 72
