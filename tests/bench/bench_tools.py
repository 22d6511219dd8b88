"""What the benchmarks share: time by device events, the copy bandwidth of this card, versions."""

import json
import platform
import statistics
import sys
from datetime import date
from pathlib import Path

import torch


def median_ms(work, repeats: int = 20, warm_up: int = 5) -> float:
    """Median time of a call in milliseconds, by device events."""
    for _ in range(warm_up):
        work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def copy_bandwidth(size: int = 2**30) -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    source, target = torch.empty(size, dtype=torch.uint8, device="cuda"), torch.empty(size, dtype=torch.uint8, device="cuda")
    source.random_()
    return 2 * size / median_ms(lambda: target.copy_(source)) / 1e6


def environment() -> dict[str, str]:
    """Card and versions."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def write_results(folder: Path, operation: str, copy_bytes_per_s: float, results: list[dict]) -> None:
    """FOLDER/<operation>_<date>.json with what was measured, the command, card and versions."""
    today = date.today().isoformat()
    everything = {
        "operation": operation,
        "command": " ".join(sys.argv),
        "date": today,
        "environment": environment(),
        "copy_bytes_per_s": copy_bytes_per_s,
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{operation}_{today}.json").write_text(json.dumps(everything, indent=1) + "\n")
