"""The report of one or several runs: a self-contained HTML page, with the PNGs beside it."""

import base64
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ngpt.analysis import compare, plots
from ngpt.analysis.compare import Run
from ngpt.config.errors import ConfigError


def write_report(run_dirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of some runs, over an older one in the same place.

    Args:
        run_dirs: One or more run folders; unfinished runs are reported as far as they went.
        out: Folder of the report. None: `report` in the run's folder; for several runs, `report_<names>` beside the first.

    Returns:
        The page's path.

    Raises:
        ConfigError: A folder is no run or has no metrics, or `out` cannot be written.
    """
    runs = compare.load_runs(run_dirs)
    folder = Path(out) if out is not None else _default_folder(runs)
    page = folder / "index.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figures = plots.write_plots(runs, folder)
        page.write_text(_render(runs, figures), encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(folder), error.strerror, "the report needs a folder it can write", "Give another with --out DIR") from None
    return page


def _default_folder(runs: Sequence[Run]) -> Path:
    first = runs[0].directory
    if len(runs) == 1:
        return first / "report"
    names = "_".join(run.directory.resolve().name for run in runs)
    # file systems take names of at most 255 bytes
    return first.parent / f"report_{names.encode()[:200].decode(errors='ignore')}"


def _render(runs: Sequence[Run], figures: Sequence[plots.Plot]) -> str:
    environment = Environment(loader=PackageLoader("ngpt", "analysis"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(
        title=" | ".join(run.name for run in runs),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        final=compare.final_rows(runs),
        plots=figures,
        images={figure.path: base64.b64encode(figure.path.read_bytes()).decode() for figure in figures},
        diff=compare.config_diff(runs),
        configs=[(run.directory / "config.yaml").read_text(encoding="utf-8") for run in runs],
        environment=compare.environment_rows(runs),
    )
