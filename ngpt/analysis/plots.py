"""The figures of a report, in the order of its page. A figure exists if any run has logged what it shows."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from ngpt.analysis import drawing, figures, formats, health, layer_panels, losses, sheets, tasks
from ngpt.analysis.drawing import Curve
from ngpt.analysis.figures import Lines
from ngpt.analysis.groups import Group
from ngpt.analysis.metrics import measured
from ngpt.analysis.sheets import Plot, Sheet

SECTIONS = ("Loss", tasks.SECTION, "Training", "Health", "Experts", "Precision")


def write_plots(groups: Sequence[Group], folder: Path) -> list[Plot]:
    """Draw every figure for which any run has data.

    Args:
        groups: One or more groups of one or more runs. A group has the same colour in all figures.
        folder: An existing folder for the PNGs.

    Returns:
        The written figures, in page order.
    """
    with matplotlib.rc_context(drawing.STYLE):
        return [sheets.write(sheet, folder) for sheet in sheets_of(groups)]


def sheets_of(groups: Sequence[Group]) -> list[Sheet]:
    """The sheets that can be drawn."""
    records = (record for group in groups for run in group.runs for record in run.metrics)
    keys = list(dict.fromkeys(key for record in records for key in record if measured(record, key)))
    training = [sheet for lines in _TRAINING if (sheet := figures.sheet(lines, groups))]
    by_keys = [sheet for module in (health, layer_panels) for sheet in module.sheets_of(groups, keys)]
    return [*losses.sheets_of(groups), *tasks.sheets_of(groups, keys), *training, *by_keys]


def _learning_rate(axes: Axes, curves: list[Curve]) -> Iterable[Artist]:
    for curve in curves:
        curve.line(axes, "learning_rate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return ()


def _grad_norm(axes: Axes, curves: list[Curve]) -> Iterable[Artist]:
    for curve in curves:
        curve.line(axes, "grad_norm", linewidth=1.1)
    drawing.log_axis(axes)
    return drawing.reference(axes, curves, "optim.clip_grad", "clipped above")


def _throughput(axes: Axes, curves: list[Curve]) -> Iterable[Artist]:
    for curve in curves:
        curve.line(axes, "tokens_per_second", linewidth=1.1)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(value)))
    return ()


_TRAINING = (
    losses.LOSS_OVER_TIME,
    Lines(
        "throughput",
        "Throughput",
        "tokens per second",
        ("tokens_per_second",),
        _throughput,
        "The whole job, all devices together.",
        "Training",
    ),
    Lines(
        "learning_rate", "Learning rate", "learning rate", ("learning_rate",), _learning_rate, "The schedule as it was applied.", "Training"
    ),
    Lines("grad_norm", "Gradient norm", "L2 norm", ("grad_norm",), _grad_norm, "Norm over all parameters, before clipping.", "Training"),
)
