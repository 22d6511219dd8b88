"""Hidden, exposed and idle time of small traces, written by hand."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from overlap import Spans, kind_of, overlap

GATHER, SCATTER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(x)"
MAIN, AUTOGRAD = 1, 2
TOOL = Path(__file__).parents[2] / "bench" / "overlap.py"


def event(name: str, start: float, stop: float, cat: str = "kernel", tid: int = 7, **args) -> dict:
    return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": stop - start, "tid": tid, "args": args}


def launched(name: str, start: float, stop: float, at: float, tid: int = MAIN, **args) -> list[dict]:
    """A kernel and the call that launched it."""
    correlation = f"{tid} {at}"
    return [event("cudaLaunchKernel", at, at + 1, "cuda_runtime", tid, correlation=correlation)] + [
        event(name, start, stop, correlation=correlation, **args)
    ]


@pytest.mark.parametrize(
    ("spans", "merged"),
    [
        ([], []),
        ([(3, 4)], [(3, 4)]),
        ([(5, 6), (0, 2)], [(0, 2), (5, 6)]),
        ([(0, 2), (2, 3)], [(0, 3)]),
        ([(0, 9), (1, 2), (3, 4), (10, 11)], [(0, 9), (10, 11)]),
        ([(0, 4), (3, 6), (5, 8)], [(0, 8)]),
    ],
    ids=str,
)
def test_a_union_merges_what_overlaps_or_touches(spans, merged):
    union = Spans.union([start for start, _ in spans], [stop for _, stop in spans])
    assert list(zip(union.starts, union.stops, strict=True)) == merged
    assert union.length == sum(stop - start for start, stop in merged)


@pytest.mark.parametrize(
    ("start", "stop", "covered"), [(0, 1, 0), (0, 20, 6), (2, 4, 2), (3, 11, 2), (6, 9, 0), (9, 12, 2), (15, 20, 0), (10, 14, 4), (5, 5, 0)]
)
def test_what_of_an_interval_is_covered(start, stop, covered):
    assert Spans.union([2, 10], [4, 14]).within([start], [stop])[0] == covered


def test_nothing_covers_nothing():
    assert Spans.union([], []).within([1, 2], [3, 4]).tolist() == [0, 0]


def test_unions_agree_with_counting_microseconds():
    generator = np.random.default_rng(0)
    starts, probes = generator.integers(0, 900, 80), generator.integers(0, 900, 40)
    stops, ends = starts + generator.integers(0, 15, 80), probes + generator.integers(0, 99, 40)
    counted = np.zeros(1000, bool)
    for start, stop in zip(starts, stops, strict=True):
        counted[start:stop] = True
    union = Spans.union(starts, stops)
    assert union.length == counted.sum()
    assert union.within(probes, ends).tolist() == [counted[a:b].sum() for a, b in zip(probes, ends, strict=True)]


def test_hidden_exposed_and_idle_make_up_the_step():
    found = overlap(
        [event("gemm", 0, 1000), event(GATHER, 800, 1300), event("gemm", 1500, 2000), event("Memset", 1990, 2010, "gpu_memset")]
    )
    figures = {name: found[f"{name}_ms"] for name in ("span", "busy", "computing", "hidden", "exposed", "idle")}
    assert figures == pytest.approx(dict(span=2.01, busy=1.81, computing=1.51, hidden=0.2, exposed=0.3, idle=0.2))


def test_two_collectives_at_once_are_counted_once_in_the_step_and_each_in_its_row():
    found = overlap([event("gemm", 0, 1000), event(GATHER, 900, 1400), event(SCATTER, 900, 1400)])
    assert (found["hidden_ms"], found["exposed_ms"]) == pytest.approx((0.1, 0.4))
    assert [(row["kind"], row["hidden_ms"], row["exposed_ms"]) for row in found["collectives"]] == [
        ("all-gather", pytest.approx(0.1), pytest.approx(0.4)),
        ("reduce-scatter", pytest.approx(0.1), pytest.approx(0.4)),
    ]


def test_phases_follow_from_who_launched_a_collective_and_when():
    autograd = "autograd::engine::evaluate_function: _LinearBackward"
    trace = [
        event("ProfilerStep#8", 0, 100, "user_annotation", MAIN),
        event("ProfilerStep#9", 100, 200, "user_annotation", MAIN),
        event("ProfilerStep#9", 100, 200, "gpu_user_annotation", 7),
        *launched(GATHER, 30, 40, at=10),
        event(autograd, 20, 30, "cpu_op", AUTOGRAD),
        *launched(GATHER, 40, 45, at=25, tid=AUTOGRAD),
        *launched(GATHER, 46, 50, at=33),  # of a second micro-batch, on the host's own thread
        event(autograd, 40, 50, "cpu_op", AUTOGRAD),
        *launched(GATHER, 70, 80, at=60),
        *launched(GATHER, 130, 140, at=110),
        event(autograd, 120, 130, "cpu_op", AUTOGRAD),
        event(GATHER, 150, 160, correlation="of no launch"),
    ]
    found = overlap(trace)
    assert found["steps"] == 2
    counts = {row["phase"]: row["count"] for row in found["collectives"]}
    assert counts == {"forward": 1.5, "backward": 0.5, "optimizer": 0.5, None: 0.5}  # a step


def test_rates_count_what_a_rank_sends():
    sizes = {"In msg nelems": 1_000_000, "Out msg nelems": 2_000_000, "dtype": "BFloat16", "Group size": 2}
    reduced = {"In msg nelems": 1_000_000, "Out msg nelems": 1_000_000, "dtype": "Float", "Group size": 4}
    found = overlap([event(GATHER, 0, 10, **sizes), event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 20, 40, **reduced)])
    assert [row["gb_per_s"] for row in found["collectives"]] == pytest.approx([2e6 / 10e-6 / 1e9, 6e6 / 20e-6 / 1e9])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (GATHER, "all-gather"),
        (SCATTER, "reduce-scatter"),
        ("ncclDevKernel_AllReduce_Sum_f32_TREE_LL(x)", "all-reduce"),
        ("ncclDevKernel_SendRecv(x)", "all-to-all"),
        ("ncclDevKernel_Broadcast_RING_LL(x)", "other NCCL"),
        ("void transformer_engine::userbuffers_fp16_sum_inplace_gpu_rr_rs_oop<2>", "userbuffers"),
        ("Memcpy PtoP (Device -> Device)", "userbuffers"),
        ("Memcpy DtoD (Device -> Device)", None),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", None),
        ("all_gather_into_something_of_triton", None),
    ],
)
def test_collectives_by_the_names_of_their_kernels(name, kind):
    assert kind_of(name) == kind


def test_a_trace_of_many_events_takes_seconds(tmp_path):
    work = [one for i in range(40_000) for one in launched(GATHER if i % 9 == 0 else "gemm", 10 * i, 10 * i + 12, at=10 * i, tid=MAIN)]
    run = tmp_path / "run"
    (run / "torch_profile").mkdir(parents=True)
    (run / "torch_profile" / "rank-0.json").write_text(json.dumps({"traceEvents": [*work, {"ph": "M", "name": "process_name"}]}))
    steps = [{"step": step, "step_time_s": seconds} for step, seconds in enumerate([9, 0.5, 0.5, 0.6, 7], start=1)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    start, out = time.monotonic(), tmp_path / "found.json"
    command = [sys.executable, str(TOOL), "--json", str(out), "--warm-up", "1", "--last", "4", str(run)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert time.monotonic() - start < 20
    assert "without the profiler 500.0, not busy 100.0" in text
    (found,) = json.loads(out.read_text())
    assert found["idle_ms"] == 0 and found["busy_ms"] == pytest.approx(400.002)
