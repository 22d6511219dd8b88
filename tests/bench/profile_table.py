"""GPU time by kernel from the torch.profiler traces of a run (`debug=profile`).

python tests/bench/profile_table.py RUN_DIR/torch_profile [ROWS]
"""

import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path


def kernel_times(trace: Path) -> dict[str, tuple[int, float]]:
    """{kernel name: (launches, seconds)} of one trace file."""
    opener = gzip.open if trace.suffix == ".gz" else open
    with opener(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    times: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            launches, seconds = times[event["name"]]
            times[event["name"]] = launches + 1, seconds + event["dur"] * 1e-6
    return times


def main(folder: Path, rows: int) -> None:
    for trace in sorted(folder.rglob("*.json*")):
        times = kernel_times(trace)
        total = sum(seconds for _, seconds in times.values())
        print(f"{trace.name}: {total * 1e3:.1f} ms on the GPU, {sum(launches for launches, _ in times.values())} launches")
        for name, (launches, seconds) in sorted(times.items(), key=lambda item: -item[1][1])[:rows]:
            print(f"{seconds * 1e3:9.2f} ms {seconds / total:6.1%} {launches:6} x  {name[:150]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 40)
