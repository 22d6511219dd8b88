import math
import re
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure

from ngpt.analysis import drawing, svg
from ngpt.analysis.groups import Series
from tests.unit.analysis.figures import alone, sheets
from tests.unit.analysis.runs import write_run


@pytest.fixture
def element(tmp_path):
    """The loss over tokens of a run whose name is no markup."""
    (sheet,) = (sheet for sheet in sheets(write_run(tmp_path / "a", config={"run": {"name": "<b> & $x$"}})) if sheet.file == "loss_tokens")
    with matplotlib.rc_context(drawing.STYLE):
        return svg.inline(alone(sheet.panels[0]), "loss_tokens")


def test_colours_are_variables_of_the_page_and_letters_are_its_letters(element):
    assert not re.search(r"#[0-9a-f]{6}\b", element) and "font-family" not in element
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", element))
    assert {"--text", "--muted", "--rule", "--series-1"} <= used <= set(drawing.LIGHT)


def test_every_colour_has_one_for_the_dark():
    assert set(drawing.LIGHT) == set(drawing.DARK)
    assert len(drawing.CSS_NAMES) == len(drawing.LIGHT)  # a colour of two names could not be told apart in a figure


def test_it_scales_with_its_place_and_is_well_formed(element):
    root = ElementTree.fromstring(element)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and "viewBox" in root.attrib and not {"width", "height"} & set(root.attrib)
    assert "<b> & $x$" in {"".join(text.itertext()).strip() for text in root.iter("{http://www.w3.org/2000/svg}text")}


def test_ids_are_those_that_something_names_and_no_other_figure_has_them(element):
    ids = re.findall(r'\bid="([^"]+)"', element)
    assert set(ids) == set(re.findall(r'(?:url\(|href=")#([^")]+)', element)) and len(ids) == len(set(ids))
    figure = Figure()
    figure.add_subplot().plot([1, 2], color=drawing.COLORS[0])
    first, second = (re.findall(r'\bid="([^"]+)"', svg.inline(figure, salt)) for salt in ("one", "two"))
    assert first and not set(first) & set(second)


def test_curves_are_where_they_were_to_a_hundredth_of_a_point():
    figure = Figure(figsize=(1, 1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.plot([0, 1 / 3, 1], [0, 1, 0], color=drawing.COLORS[0])
    axes.set(xlim=(0, 1), ylim=(0, 1))
    # 72 points a side, upside down
    assert "M 0 72" in (element := svg.inline(figure, "x")) and "L 24 0" in element and "L 72 72" in element


def test_a_colour_that_would_be_wrong_in_the_dark_is_refused():
    figure = Figure()
    figure.add_subplot().plot([1, 2], color="#123456")
    with pytest.raises(ValueError, match="#123456.*CSS_NAMES"):
        svg.inline(figure, "x")


def test_a_thinned_curve_keeps_its_ends_its_spikes_and_its_gaps():
    y = [math.sin(index / 300) for index in range(10_000)]
    y[1234], y[5678], y[7777] = 50.0, -50.0, math.nan
    x = [float(index) for index in range(len(y))]
    found = drawing.thinned(Series(x, y, y, y), 500)
    assert len(found) <= 500 and (found.x[0], found.x[-1]) == (0, 9999) and found.x == sorted(found.x)
    assert max(found.mean) == 50 and min(found.mean) == -50 and any(map(math.isnan, found.mean))
    assert all(value == y[int(place)] or math.isnan(value) for place, value in zip(found.x, found.mean, strict=True))


def test_a_short_curve_is_not_thinned():
    found = Series([1.0, 2.0], [3.0, 4.0], [3.0, 4.0], [3.0, 4.0])
    assert drawing.thinned(found, 2) is found
