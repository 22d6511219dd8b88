"""The page of a study, made only from its results, with its figures as PNG and SVG beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined

from ngpt.analysis import drawing, sheets
from ngpt.config.errors import ConfigError
from ngpt.study.cells import comparison_tables, run_rows, unbounded_notes
from ngpt.study.design import design_rows, provenance_rows
from ngpt.study.figures import absent, sheets_of
from ngpt.study.judgement import verdict_reason, verdict_tables


def write_page(results: Mapping[str, Any], folder: Path) -> Path:
    """Writes index.html and the figures into a folder.

    Args:
        results: as made or read by `ngpt.study.results`.

    Returns:
        The page's path.

    Raises:
        ConfigError: the folder cannot be written.
    """
    page = folder / "index.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(drawing.STYLE):
            made = sheets_of(results)
            plots = [sheets.write(sheet, folder) for sheet in made]
            for sheet in made:
                sheets.grid(sheet).savefig(folder / f"{sheet.file}.svg", metadata={"Date": None})
        page.write_text(_render(results, plots), encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(folder), error.strerror, "The page needs a folder it can write", "Give another with --out DIR") from None
    return page


def _render(results: Mapping[str, Any], plots: list[sheets.Plot]) -> str:
    environment = Environment(
        loader=PackageLoader("ngpt", "study"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css = Environment(loader=PackageLoader("ngpt", "analysis"), trim_blocks=True, lstrip_blocks=True).get_template("report.css.j2")
    return environment.get_template("study.html.j2").render(
        results=results,
        study=results["study"],
        css=css.render(light=drawing.LIGHT, dark=drawing.DARK),
        plots=plots,
        absent=absent(results),
        reason=verdict_reason(results),
        rules=verdict_tables(results),
        unbounded=unbounded_notes(results),
        design=design_rows(results),
        tables=comparison_tables(results),
        provenance=provenance_rows(results),
        runs=run_rows(results),
    )
