"""The figures of run folders before they are rendered, which takes most of the time."""

import matplotlib
from matplotlib.figure import Figure

from ngpt.analysis import drawing, plots
from ngpt.analysis.compare import load_runs
from ngpt.analysis.groups import group_runs


def drawn(*folders, only=None):
    """{file of a sheet: [figure of each of its panels]}. `only`: one file, to save time."""
    with matplotlib.rc_context(drawing.STYLE):
        found = [sheet for sheet in sheets(*folders) if only in (None, sheet.file)]
        return {sheet.file: [alone(panel) for panel in sheet.panels] for sheet in found}


def sheets(*folders):
    return plots.sheets_of(group_runs(load_runs(folders)))


def alone(panel):
    figure = Figure(figsize=(panel.width, panel.height))
    panel.draw(figure)
    return figure


def axes_of(file, *folders):
    """The axes of a sheet of one panel with one axes."""
    (figure,) = drawn(*folders, only=file)[file]
    (axes,) = figure.axes
    return axes


def legend_of(axes):
    """{label: handle} of all legends of some axes."""
    return {
        text.get_text(): handle
        for child in axes.get_children()
        if hasattr(child, "legend_handles")
        for text, handle in zip(child.get_texts(), child.legend_handles, strict=True)
    }


def values(line):
    return list(line.get_xdata()), list(line.get_ydata())
