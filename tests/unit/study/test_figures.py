"""The figures of a page: ticks that can be read, arms that are left out, and the averaging model."""

import copy
import html
import math
from itertools import pairwise

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ngpt.analysis import drawing, sheets
from ngpt.analysis.intervals import Interval
from ngpt.study.axis_figures import averaging_model
from ngpt.study.drawing import left_out
from ngpt.study.figures import absent, sheets_of
from ngpt.study.page import write_page
from tests.unit.study.studies import gathered


def labels_of(panel):
    """The labels of the ticks of a panel that are drawn, and their places in pixels, from the left."""
    with matplotlib.rc_context(drawing.STYLE):
        figure = sheets.alone(panel)
        figure.canvas = FigureCanvasAgg(figure)
        figure.canvas.draw()
        (axes,) = figure.axes
        shown = [tick.label1 for tick in axes.xaxis._update_ticks() if tick.label1.get_text()]
        return [text.get_text() for text in shown], [text.get_window_extent() for text in shown]


@pytest.mark.parametrize(
    ("places", "shown"),
    [
        ([512, 1024, 2048, 4096], ["512", "1024", "2048", "4096"]),
        ([1e-3, 4e-3, 1.6e-2], ["0.001", "0.004", "0.016"]),
        # as in the study of the learning rate: two places that nearly coincide among others that are near
        (
            [4.65e-4, 6.6e-4, 9.3e-4, 1.3e-3, 1.86e-3, 1.85e-3, 2.6e-3, 3.7e-3, 5.2e-3, 7.4e-3],
            ["0.000465", "0.00093", "0.00185", "0.0037", "0.0074"],
        ),
        ([1.85e-3, 1.86e-3], ["0.00185", "0.00186"]),
        ([1e-3 * 2 ** (number / 8) for number in range(40)], None),
    ],
)
def test_ticks_over_a_scan_are_all_places_but_those_whose_labels_would_overlap(study, places, shown):
    found = gathered(study)
    row = found["comparisons"]["widths"]["rows"][0]
    found["comparisons"]["widths"]["rows"] = [row | {"point": {"model.hidden_size": place}} for place in places]
    found["study"]["figures"] = [found["study"]["figures"][2] | {"model": "none", "of": ["widths"]}]
    ((panel,),) = [sheet.panels for sheet in sheets_of(found)]
    labels, boxes = labels_of(panel)
    assert labels == shown if shown else len(labels) > 3
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


@pytest.mark.parametrize(
    ("estimate", "half"), [(0.0003, 0.0008), (0.2, 0.5), (-0.001348, 0.000463), (1.1234, 0.0002), (-3.05, 33.4), (5e5, 4e5)]
)
def test_labels_below_intervals_do_not_overlap(study, estimate, half):
    found = gathered(study)
    interval = Interval(estimate, estimate - half, estimate + half, 3, "").to_json()
    found["comparisons"]["gap"]["rows"] = [found["comparisons"]["gap"]["rows"][0] | {"interval": interval}]
    found["study"]["figures"] = found["study"]["figures"][:1]
    ((panel,),) = [sheet.panels for sheet in sheets_of(found)]
    labels, boxes = labels_of(panel)
    assert len(labels) > 2 and all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_a_figure_names_the_arms_that_it_leaves_out_and_why(study, tmp_path):
    plan, folder = study
    found = gathered(study)
    intervals, tokens, scan, layers = found["study"]["figures"]
    assert not any(left_out(found, figure) for figure in found["study"]["figures"])
    rows = {name: found["comparisons"][name]["rows"] for name in ("gap", "widths", "gain")}
    without = {"note": "a parabola has no lowest point", "interval": rows["gap"][0]["interval"] | {"estimate": None}}

    rows["widths"][1] |= without  # of two places of one arm
    assert left_out(found, scan) == "Left out of “widths”: wide (hidden_size 128): a parabola has no lowest point."
    rows["widths"][0] |= without
    assert left_out(found, scan) == "Left out of “widths”: wide: a parabola has no lowest point."
    rows["widths"][0] |= {"note": ""}
    assert left_out(found, scan) == "Left out of “widths”: wide: no number. wide: a parabola has no lowest point."
    assert left_out(found, scan | {"over": "optim.lr"}) == ""  # which it does not scan
    rows["gain"][1] |= without
    assert left_out(found, layers) == ""  # a layer that is not finite leaves the arm without a number, and the others are drawn
    without_layers = copy.deepcopy(found)
    for place in (0, 1):
        assert left_out(without_layers, layers) == ""  # it is of the last place
        for run in without_layers["runs"]:
            if run["point"] == rows["gain"][place]["point"]:
                run["layers"]["gain"] = {}
    assert left_out(without_layers, layers) == "Left out: wide: a parabola has no lowest point."
    rows["gain"][0] |= without

    rows["gap"][-1] |= without
    label = rows["gap"][-1]["label"]
    assert left_out(found, intervals) == f"Left out: {label}: a parabola has no lowest point."
    assert left_out(found, tokens) == ""  # a run that diverged has no last loss, and a curve up to there
    found["comparisons"]["gap"]["curves"][-1]["places"] = []
    assert left_out(found, tokens) == f"Left out: {label}: a parabola has no lowest point."
    lines = [f"No figure “{figure['title']}”. Left out: {label}: a parabola has no lowest point." for figure in (intervals, tokens)]
    page = html.unescape(write_page(found, tmp_path / "page").read_text())
    assert absent(found)[:2] == lines and all(page.count(line) == 1 for line in lines)  # the only arm of both

    rows["gap"].append(gathered(study)["comparisons"]["gap"]["rows"][-1] | {"arm": "another", "label": "Another"})
    assert [line.partition(".")[0] for line in absent(found)[:2]] == ["No figure “The gap”", "No figure “Over the width”"]
    page = html.unescape(write_page(found, tmp_path / "page").read_text())
    assert f"<figcaption>Left out: {label}: a parabola has no lowest point.</figcaption>" in page


def test_the_averaging_model_is_the_mean_of_the_layers_gains():
    """Correlations that differ between layers: the mean of logarithms is less than the logarithm of means."""
    layers = {"signal": {"0": 0.0, "1": 0.03}, "noise": {"0": 0.0, "1": 0.0}}
    run = {"arm": "wide", "point": {"model.hidden_size": 1001}, "measures": {}, "layers": layers}
    figure = {"over": "model.hidden_size", "rho": ["signal", "noise"]}
    (model,) = averaging_model({"runs": [run]}, figure)
    arm, x, y = model
    assert (arm, x[0], x[-1]) == ("wide", 1001, 16384)
    assert y[0] == pytest.approx(10 * math.log10(31) / 2) and y[-1] == pytest.approx(10 * math.log10(1 + 16383 * 0.03) / 2)
