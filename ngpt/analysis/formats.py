"""Numbers formatted for people."""

import json
from typing import Any

MISSING = "–"


def count(value: float) -> str:
    """Short form of a count: 950, 1.5K, 20M, 1.25B, 3T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # 999,950 already rounds to 1M, not to 1000K
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def full_count(value: float) -> str:
    """A count with its short form: `1,250,000 (1.25M)`."""
    return f"{value:,.0f} ({count(value)})" if value >= 10_000 else f"{value:,.0f}"


def plain(value: Any) -> str:
    """A config or environment value: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def short(name: str, length: int = 30) -> str:
    """A long name with its middle cut out, since names of runs differ at their ends."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"
