"""The report of one or several runs: a self-contained HTML page, with its figures as PNGs and its data as CSV beside it."""

import hashlib
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ngpt.analysis import compare, drawing, plots, results
from ngpt.analysis.compare import Row, Run
from ngpt.analysis.download import Download, write_downloads
from ngpt.analysis.groups import Group, group_runs
from ngpt.analysis.sheets import Plot
from ngpt.analysis.sweep import SettingTable, member_folders, sweep_groups
from ngpt.config.errors import ConfigError
from ngpt.sweeps import is_sweep

NAME_CHARACTERS = 50  # of the names of runs in the name of a folder; file systems allow 255 bytes in all


def write_report(run_dirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> Path:
    """Write a report of runs. Replaces an older one in the same place. Runs that differ only in their seed are one group.

    Args:
        run_dirs: One or more run folders. Unfinished runs are reported as far as they went. A sweep's folder stands for its members; given
            alone, the report gets a table of final losses by swept values.
        out: Folder of the report. None: `report` in the run's folder; for several runs, `report_<names>` beside the first, in which
            long names are cut and a hash tells sets of runs apart.

    Returns:
        The page's path.

    Raises:
        ConfigError: A folder is not a run or has no metrics, or `out` cannot be written.
    """
    if len(run_dirs) == 1 and is_sweep(folder := Path(run_dirs[0])):
        title, groups, table = sweep_groups(folder)
        return write_group_report(groups, folder / "report" if out is None else Path(out), title, table)
    runs = compare.load_runs([member for folder in run_dirs for member in member_folders(folder)])
    return write_group_report(group_runs(runs), Path(out) if out is not None else _default_folder(runs))


def write_group_report(groups: Sequence[Group], folder: Path, title: str | None = None, settings: SettingTable | None = None) -> Path:
    """Write the report of groups of runs. The others are compared with the first.

    Args:
        title: None: the names of the groups.
        settings: A table of final losses, placed first.

    Returns:
        The page's path.

    Raises:
        ConfigError: `folder` cannot be written.
    """
    page = folder / "index.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figures = plots.write_plots(groups, folder)
        downloads = write_downloads([run for group in groups for run in group.runs], folder)
        page.write_text(_render(groups, figures, downloads, title or _title(groups), settings), encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(folder), error.strerror, "The report needs a folder it can write", "Give another with --out DIR") from None
    return page


def _default_folder(runs: Sequence[Run]) -> Path:
    first = runs[0].directory
    if len(runs) == 1:
        return first / "report"
    folders = [run.directory.resolve() for run in runs]
    names = "_".join(folder.name for folder in folders)
    if len(names) > NAME_CHARACTERS:
        of_these = hashlib.sha256("\n".join(map(str, folders)).encode(errors="surrogateescape")).hexdigest()[:6]
        names = f"{folders[0].name[:NAME_CHARACTERS]}_and_{len(runs) - 1}_more_{of_these}"
    return first.parent / f"report_{names}"


def _render(
    groups: Sequence[Group], figures: Sequence[Plot], downloads: Sequence[Download], title: str, settings: SettingTable | None
) -> str:
    environment = Environment(
        loader=PackageLoader("ngpt", "analysis"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    runs = [run for group in groups for run in group.runs]
    return environment.get_template("report.html.j2").render(
        title=title,
        settings=settings,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        light=drawing.LIGHT,
        dark=drawing.DARK,
        groups=groups,
        runs=runs,
        states=list(results.status_lines(groups)),
        leads=results.leads(groups),
        final=results.final_rows(groups),
        final_of_runs=results.final_rows([Group(run.name, (run,)) for run in runs]) if len(runs) > len(groups) else [],
        not_measured=results.not_measured(groups),
        sections=[(section, [plot for plot in figures if plot.section == section]) for section in plots.SECTIONS],
        thinned=drawing.POINTS if any(len(run.metrics) > drawing.POINTS for run in runs) else None,
        diff=_config_diff(groups),
        configs=[(run.directory / "config.yaml").read_text(encoding="utf-8") for run in runs],
        environment=compare.environment_rows(runs),
        downloads=downloads,
    )


def _title(groups: Sequence[Group]) -> str:
    names = [group.label for group in groups]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def _config_diff(groups: Sequence[Group]) -> list[Row]:
    """The keys in which groups differ, and the seeds of groups with several runs."""
    rows = compare.config_diff([group.runs[0] for group in groups])
    if all(len(group.runs) == 1 for group in groups):
        return rows
    seeds = Row("train.seed", [", ".join(str(run.flat_config.get("train.seed")) for run in group.runs) for group in groups])
    return [seeds, *(row for row in rows if row.label != seeds.label)]
