"""GPU time by kernel, and host time by operation and layer, from the torch.profiler traces of a run (`debug=profile`).

    python tests/bench/profile_table.py RUN_DIR/torch_profile [ROWS [PATTERN]]

PATTERN is the run's `model.layer_pattern`, for the host time of each kind of layer; the trace has one micro-batch, through Transformer
Engine. The profiler itself slows the host: what the GPU waits for it in a trace is more than without. Kernel times are as without.
"""

import gzip
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

Times = dict[str, tuple[int, float]]  # {name: (count, seconds)}
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def read(trace: Path) -> list[dict]:
    opener = gzip.open if trace.suffix == ".gz" else open
    with opener(trace, "rt") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def kernel_times(events: Iterable[dict]) -> Times:
    times: Times = defaultdict(lambda: (0, 0.0))
    for event in events:
        if event["cat"] in GPU_WORK:
            _add(times, event["name"], event["dur"])
    return times


def busy_seconds(events: Iterable[dict]) -> tuple[float, float]:
    """Seconds in which any kernel ran, and those from the first kernel's start to the last one's end."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["cat"] in GPU_WORK)
    if not spans:
        return 0.0, 0.0
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy * 1e-6, (end - spans[0][0]) * 1e-6


def host_times(events: Iterable[dict]) -> Times:
    """Time of each operation without that of the operations it calls."""
    times: Times = defaultdict(lambda: (0, 0.0))
    threads: dict[int, list[dict]] = defaultdict(list)
    for event in events:
        if event["cat"] in ("cpu_op", "cuda_runtime", "cuda_driver"):
            threads[event["tid"]].append(event)
    for of_thread in threads.values():
        open_calls: list[tuple[float, str]] = []  # (end, name) of the operations around the present one
        for event in sorted(of_thread, key=lambda event: (event["ts"], -event["dur"])):
            while open_calls and open_calls[-1][0] <= event["ts"]:
                open_calls.pop()
            if open_calls:
                count, seconds = times[open_calls[-1][1]]
                times[open_calls[-1][1]] = count, seconds - event["dur"] * 1e-6
            _add(times, event["name"], event["dur"])
            open_calls.append((event["ts"] + event["dur"], event["name"]))
    return times


def layer_spans(events: list[dict], pattern: str) -> Iterator[tuple[str, str, float]]:
    """(symbol, "forward" or "backward", host seconds less waits for the GPU) of each layer whose two ends the trace shows.

    nGPT's residual step ends a layer and begins its backward pass; the control's norm begins a layer and ends its backward pass.
    """
    host = sorted((event for event in events if event["cat"] in ("cpu_op", "cuda_runtime", "cuda_driver")), key=lambda event: event["ts"])
    ngpt = any(event["name"] == "_LerpRetract" for event in host)
    mark = "_LerpRetract" if ngpt else "_OperationFuserAutogradFunction"
    forward, backward = ([event for event in host if event["name"] == name] for name in (mark, f"{mark}Backward"))
    if ngpt:
        ends = [event["ts"] + event["dur"] for event in forward]
        spans = [(*span, symbol, "forward", forward) for span, symbol in zip(zip(ends, ends[1:], strict=False), pattern[1:], strict=True)]
        starts = [event["ts"] for event in backward]
        pairs = zip(starts, starts[1:], strict=False)
        spans += [(*span, symbol, "backward", backward) for span, symbol in zip(pairs, pattern[:0:-1], strict=True)]
    else:  # the last norm is behind the last layer
        starts = [event["ts"] for event in forward]
        spans = [(*span, symbol, "forward", forward) for span, symbol in zip(zip(starts, starts[1:], strict=False), pattern, strict=True)]
        ends = [event["ts"] + event["dur"] for event in backward]
        pairs = zip(ends, ends[1:], strict=False)
        spans += [(*span, symbol, "backward", backward) for span, symbol in zip(pairs, pattern[::-1], strict=True)]
    waits = [event for event in host if event["name"].endswith("Synchronize")]
    for begin, end, symbol, direction, marks in spans:
        waited = sum(event["dur"] for event in waits if event["tid"] == marks[0]["tid"] and begin <= event["ts"] < end)
        yield symbol, direction, (end - begin - waited) * 1e-6


def _add(times: Times, name: str, microseconds: float) -> None:
    count, seconds = times[name]
    times[name] = count + 1, seconds + microseconds * 1e-6


def _print(times: Times, rows: int) -> None:
    total = sum(seconds for _, seconds in times.values())
    for name, (count, seconds) in sorted(times.items(), key=lambda item: -item[1][1])[:rows]:
        print(f"{seconds * 1e3:9.2f} ms {seconds / total:6.1%} {count:6} x  {name[:150]}")


def _print_layers(events: list[dict], pattern: str) -> None:
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for symbol, direction, span in layer_spans(events, pattern.replace("|", "")):
        seconds[symbol, direction].append(span)
    for (symbol, direction), spans in sorted(seconds.items()):
        print(f"{statistics.median(spans) * 1e3:9.2f} ms of the host, median of {len(spans):3} layers {symbol} {direction}")


def main(folder: Path, rows: int, pattern: str | None) -> None:
    for trace in sorted(folder.rglob("*.json*")):
        events = read(trace)
        kernels, (busy, span) = kernel_times(events), busy_seconds(events)
        launches = sum(count for count, _ in kernels.values())
        total = sum(seconds for _, seconds in kernels.values())
        print(f"{trace.name}: {total * 1e3:.1f} ms on the GPU, {launches} launches; busy {busy * 1e3:.1f} of {span * 1e3:.1f} ms")
        _print(kernels, rows)
        print("host, each operation without those it calls:")
        _print(host_times(events), rows)
        if pattern:
            _print_layers(events, pattern)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 40, sys.argv[3] if len(sys.argv) > 3 else None)
