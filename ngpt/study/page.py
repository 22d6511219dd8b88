"""The page of a study, made only from its results, with its figures as PNG and SVG beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined

from ngpt.analysis import drawing, formats, sheets
from ngpt.config.errors import ConfigError
from ngpt.study.cells import comparison_tables, design_rows, interval_text, run_rows
from ngpt.study.figures import sheets_of


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
    study = results["study"]
    return environment.get_template("study.html.j2").render(
        results=results,
        study=study,
        size=study["sizes"][results["size"]],
        css=css.render(light=drawing.LIGHT, dark=drawing.DARK),
        plots=plots,
        design=design_rows(results),
        tables=comparison_tables(results),
        runs=run_rows(results),
        text=interval_text,
        plain=formats.plain,
    )
