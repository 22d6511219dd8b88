"""What of a rank's communication runs behind computing, and what the GPU waits for, from the torch.profiler traces of runs.

    python tests/bench/overlap.py [--json FILE] [--warm-up STEPS] [--last STEP] RUN_DIR [RUN_DIR...]     runs with `debug=profile`

Computing is every kernel, copy and fill that is not a collective. Hidden: the part of a collective during which something is computed on
the same GPU; exposed: the rest; idle: neither. Shares are of the trace's span from the first kernel to the last. The kinds' times are sums
over kernels: two collectives at once count twice, in the step's rows once. A collective's kernel also waits for the other ranks, which its
rate shows: bytes that a rank sends, over the kernel's time, medians.

A collective belongs to backward where autograd launched it, hooks of gradients included, to forward where the host did so before the last
backward pass of its step, else to the optimizer. Nothing but the profiler's own steps says where a step ends.

The profiler slows the host, so idle is longer in the trace than without. Of the steps without it (metrics.jsonl, those behind the warm-up
and up to the last named) the table has the median and what of it the GPU is not busy: what the host, or a slower rank, costs.
"""

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from profile_table import GPU_WORK, read

# What a kernel's name says, in lower case; the first that fits. Userbuffers copy between GPUs by kernels or by the copy engines.
KINDS = {
    "all-gather": r"nccl.*allgather",
    "reduce-scatter": r"nccl.*reducescatter",
    "all-reduce": r"nccl.*allreduce",
    "all-to-all": r"nccl.*(sendrecv|alltoall)",
    "other NCCL": r"^nccl",
    "userbuffers": r"userbuffers|memcpy ptop",
}
BYTES = {"Byte": 1, "Bool": 1, "BFloat16": 2, "Half": 2, "Float": 4, "Int": 4, "Double": 8, "Long": 8}
PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Spans:
    """Disjoint intervals in order; microseconds."""

    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def union(cls, starts: Sequence[float], stops: Sequence[float]) -> "Spans":
        """Of intervals in any order, which may overlap or touch."""
        starts, stops = np.asarray(starts, float), np.asarray(stops, float)
        order = np.argsort(starts, kind="stable")
        starts, reach = starts[order], np.maximum.accumulate(stops[order])
        opens = np.ones(len(starts), bool)
        opens[1:] = starts[1:] > reach[:-1]
        return cls(starts[opens], reach[np.roll(opens, -1)] if len(starts) else reach)

    @property
    def length(self) -> float:
        return float((self.stops - self.starts).sum())

    def within(self, starts: Sequence[float], stops: Sequence[float]) -> np.ndarray:
        """How much of each of these intervals is covered."""
        return self._before(np.asarray(stops, float)) - self._before(np.asarray(starts, float))

    def _before(self, times: np.ndarray) -> np.ndarray:
        """How much is covered up to each time."""
        if not len(self.starts):
            return np.zeros(len(times))
        whole = np.concatenate([[0.0], np.cumsum(self.stops - self.starts)])
        index = np.searchsorted(self.starts, times, side="right")
        beyond = self.stops[index - 1] - np.minimum(times, self.stops[index - 1])  # of the interval that began last
        return whole[index] - np.where(index > 0, beyond, 0.0)


def kind_of(name: str) -> str | None:
    """The collective that a kernel or copy is part of; None: it computes."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), None)


def sent_bytes(event: dict) -> float | None:
    """What a rank sends in an NCCL kernel, where torch says how much; None: it does not."""
    args, kind = event["args"], kind_of(event["name"])
    size, element = args.get("Group size"), BYTES.get(args.get("dtype", ""))
    whole = max(args.get("In msg nelems", 0), args.get("Out msg nelems", 0))
    if not size or not element or not whole:
        return None
    return whole * element * (size - 1) / size * (2 if kind == "all-reduce" else 1)


class Phases:
    """Which phase of a step launched a kernel."""

    def __init__(self, events: list[dict]):
        self._launches = {}
        backward, steps = defaultdict(list), []
        for event in events:
            if event["cat"] in ("cuda_runtime", "cuda_driver"):
                self._launches[event.get("args", {}).get("correlation")] = event
            elif event["name"].startswith("autograd::engine::evaluate_function"):
                backward[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
            elif event["name"].startswith("ProfilerStep") and event["cat"] == "user_annotation":
                steps.append(event["ts"])
        self._backward = {tid: Spans.union(*zip(*spans, strict=True)) for tid, spans in backward.items()}
        self._starts = np.sort(steps)
        stops = np.sort([stop for spans in self._backward.values() for stop in spans.stops])
        inside = self._step(stops)
        self._last = {int(step): stops[inside == step].max() for step in np.unique(inside)}

    @property
    def steps(self) -> int:
        return max(len(self._starts), 1)

    def __call__(self, event: dict) -> str | None:
        launch = self._launches.get(event["args"].get("correlation"))
        if launch is None:
            return None
        spans, time = self._backward.get(launch["tid"]), launch["ts"]
        if spans is not None and spans.within([time], [time + launch["dur"]])[0] > 0:
            return "backward"
        return "forward" if time < self._last.get(int(self._step([time])[0]), np.inf) else "optimizer"

    def _step(self, times: Sequence[float]) -> np.ndarray:
        return np.searchsorted(self._starts, times, side="right")


def overlap(events: list[dict]) -> dict:
    """Milliseconds a step of the rank, and its collectives by kind and phase."""
    work = [event for event in events if event["cat"] in GPU_WORK]
    starts = np.array([event["ts"] for event in work], float)
    stops = starts + np.array([event["dur"] for event in work], float)
    kinds = {name: kind_of(name) for name in {event["name"] for event in work}}
    sends = np.array([kinds[event["name"]] is not None for event in work], bool)
    computing, busy = Spans.union(starts[~sends], stops[~sends]), Spans.union(starts, stops)
    communicating = Spans.union(starts[sends], stops[sends])
    hidden = computing.within(starts, stops)
    phases = Phases(events)
    rows = defaultdict(list)
    for index in np.flatnonzero(sends):
        event = work[index]
        rows[kinds[event["name"]], phases(event)].append((event["dur"], hidden[index], sent_bytes(event)))
    span, scale = stops.max() - starts.min() if len(work) else 0.0, 1e-3 / phases.steps
    found = {
        "steps": phases.steps,
        "span_ms": span * scale,
        "busy_ms": busy.length * scale,
        "computing_ms": computing.length * scale,
        "hidden_ms": (computing.length + communicating.length - busy.length) * scale,
        "exposed_ms": (busy.length - computing.length) * scale,
        "idle_ms": (span - busy.length) * scale,
    }
    return found | {"collectives": [_row(*key, rows[key], phases.steps) for key in sorted(rows, key=_order)]}


def _order(key: tuple[str, str | None]) -> tuple:
    kind, phase = key
    return list(KINDS).index(kind), PHASES.index(phase) if phase in PHASES else len(PHASES)


def _row(kind: str, phase: str | None, kernels: list[tuple], steps: int) -> dict:
    scale, times, hidden = 1e-3 / steps, *np.array([kernel[:2] for kernel in kernels], float).T
    rates = [sent / time * 1e-3 for time, _, sent in kernels if sent and time]
    return {
        "kind": kind,
        "phase": phase,
        "count": len(kernels) / steps,
        "ms": times.sum() * scale,
        "hidden_ms": hidden.sum() * scale,
        "exposed_ms": (times - hidden).sum() * scale,
        "median_us": float(np.median(times)),
        "gb_per_s": statistics.median(rates) if rates else None,
    }


def untraced_ms(run: Path, warm_up: int, last: int | None) -> float | None:
    """Median of a run's steps behind the warm-up and up to the last."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    times = [line["step_time_s"] for line in lines if "step_time_s" in line and warm_up < line["step"] <= (last or line["step"])]
    return statistics.median(times) * 1e3 if times else None


def table(found: dict) -> str:
    """The text of one trace."""
    lines = [f"{found['run']}, {found['trace']}: {found['steps']} steps of {found['span_ms']:.1f} ms, GPU busy {found['busy_ms']:.1f}"]
    if found["untraced_ms"] is not None:
        rest = found["untraced_ms"] - found["busy_ms"]
        lines[0] += f"; without the profiler {found['untraced_ms']:.1f}, not busy {rest:.1f} ({rest / found['untraced_ms']:.1%})"
    for name in ("computing", "exposed", "idle", "hidden"):
        lines.append(f"{found[f'{name}_ms']:9.2f} ms {found[f'{name}_ms'] / found['span_ms']:6.1%}  {name}")
    for row in found["collectives"]:
        rate = f"{row['gb_per_s']:5.0f} GB/s" if row["gb_per_s"] else " " * 10
        times = f"{row['ms']:9.2f} ms, hidden {row['hidden_ms']:8.2f}, exposed {row['exposed_ms']:8.2f}"
        lines.append(f"{times}, {row['count']:6.0f} x {row['median_us']:7.1f} us {rate}  {row['kind']}, {row['phase'] or 'phase unknown'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--last", type=int)
    options = parser.parse_args()
    results = []
    for run in options.runs:
        for trace in sorted((run / "torch_profile").glob("*.json*")):
            known = {"run": run.name, "trace": trace.name, "untraced_ms": untraced_ms(run, options.warm_up, options.last)}
            found = known | overlap(read(trace))
            if not found["span_ms"]:
                sys.exit(f"{trace}: nothing of a GPU in it")
            results.append(found)
            print(table(found), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
