"""Time spans as a person reads them, the same wherever one is printed."""


def duration(seconds: float) -> str:
    """`48.2 s`, `12 min 05 s`, `3 h 20 min`, `2 days 04 h`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400:,} days {whole % 86400 // 3600:02d} h"
