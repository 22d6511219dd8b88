"""What the benchmarks share: time by device events, the copy bandwidth of this card, versions."""

import platform
import statistics

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
