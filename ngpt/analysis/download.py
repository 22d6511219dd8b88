"""The figures of a report as CSV: a file beside the page, also embedded in the page if it is small."""

import base64
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ngpt.analysis import layer_panels
from ngpt.analysis.compare import Run

# browsers truncate addresses at 2 MiB
_INSIDE = 1_500_000


@dataclass(frozen=True)
class Download:
    """`address`: the whole table as a data URL, or the name of the file beside the page. `size`: the table's size in bytes."""

    name: str
    description: str
    address: str
    size: int

    @property
    def inside(self) -> bool:
        return self.address.startswith("data:")


def write_downloads(runs: Sequence[Run], folder: Path) -> list[Download]:
    """Write `metrics.csv`, and `precision.csv` if figures of single layers were logged. One row per record, one column per key.

    An empty cell means not measured, `nan` means not finite. Confidence bounds, and figures that are not drawn, are only in metrics.jsonl.
    """
    tables = {
        "metrics.csv": ("everything logged but figures of single layers", lambda key: not key.startswith("precision/")),
        "precision.csv": ("the figures of single layers that are drawn", layer_panels.is_drawn),
    }
    found = []
    for name, (description, wanted) in tables.items():
        content = _table(runs, wanted)
        if content is None:
            (folder / name).unlink(missing_ok=True)  # left by an earlier report in this folder
            continue
        (folder / name).write_bytes(content)
        data = f"data:text/csv;base64,{base64.b64encode(content).decode()}"
        found.append(Download(name, description, data if len(data) <= _INSIDE else name, len(content)))
    return found


def _table(runs: Sequence[Run], wanted: Callable[[str], bool]) -> bytes | None:
    """The CSV; None if no run has a wanted key."""
    logged = dict.fromkeys(key for run in runs for record in run.metrics for key in record)
    keys = [key for key in logged if key not in ("step", "tokens", "nonfinite") and wanted(key)]
    if not keys:
        return None
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["run", "step", "tokens", *keys])
    for run in runs:
        for record in run.metrics:
            nonfinite = record.get("nonfinite", ())
            cells = ["nan" if key in nonfinite else record.get(key) for key in keys]
            if any(cell is not None for cell in cells):
                writer.writerow([run.name, record["step"], record.get("tokens"), *cells])
    return stream.getvalue().encode()
