import math

import numpy
import pytest

from ngpt.analysis import drawing, layer_panels
from tests.unit.analysis.figures import drawn, legend_of, sheets
from tests.unit.analysis.runs import TOKENS_PER_STEP, record, write_run

GEMMS, OPERANDS = ("fprop", "dgrad", "wgrad"), ("input", "weight", "grad_output")  # as diagnostics name them
LINEARS = {0: "self_attention.linear_qkv", 1: "mlp.linear_fc1", 2: "self_attention.linear_qkv", 10: "self_attention.linear_qkv"}
FILES = ["dot_snr_db", "relative_error", "signal_correlation", "noise_correlation"]


def value(depth: int, step: int) -> float:
    return depth + step / 100


def watched(step: int, offset: float = 0.0, **changes: float) -> dict[str, float]:
    """A record of a health step with figures of four linears, one decimal place apart."""
    figures = {}
    for depth, linear in LINEARS.items():
        prefix = f"precision/layers.{depth}.{linear}"
        for gemm in GEMMS:
            figures[f"{prefix}/{gemm}/dot_snr_db"] = offset + value(depth, step)
            figures[f"{prefix}/{gemm}/signal_correlation"] = 0.5
            figures[f"{prefix}/{gemm}/signal_correlation_lower"] = 0.4
            figures[f"{prefix}/{gemm}/noise_correlation"] = 0.01
        for operand in OPERANDS:
            figures[f"{prefix}/{operand}/relative_error"] = 0.1
            figures[f"{prefix}/{operand}/snr_db"] = 20.0
    return record(step, **(figures | changes))


def health_run(path, config=None, **options):
    """Figures at every second record, as where health steps are rarer than logged steps."""
    return write_run(path, [line for step in (10, 20, 30) for line in (record(step - 5), watched(step, **options))], config)


def kinds(figure):
    """The axes of a panel by the kind of linear; the colour bar is titled with words."""
    return {axes.get_title("left"): axes for axes in figure.axes if " " not in axes.get_title("left")}


def cells(axes):
    (image,) = axes.images
    return image.get_array()


def test_layers_are_grouped_by_kind_in_the_order_of_the_model():
    keys = [f"precision/layers.{depth}.{linear}/fprop/dot_snr_db" for depth, linear in reversed(LINEARS.items())]
    keys += ["precision/layers.3.mlp.experts.7.linear_fc1/fprop/dot_snr_db", "precision/layers.4.x/fprop/dot_snr_db_lower"]
    keys += ["precision/layers.5.x/input/dot_snr_db", "health/sz/mean", "train_loss"]
    found = layer_panels.find_layers(keys, "dot_snr_db", ("fprop", "dgrad"))
    assert list(found) == ["self_attention.linear_qkv", "mlp.linear_fc1", "mlp.experts.linear_fc1"]
    assert found["self_attention.linear_qkv"] == {
        "fprop": [(depth, f"precision/layers.{depth}.self_attention.linear_qkv/fprop") for depth in (0, 2, 10)]
    }


def test_a_map_has_a_row_a_layer_and_a_column_a_health_step(tmp_path):
    folder = health_run(tmp_path / "a")
    precision = [sheet for sheet in sheets(folder) if sheet.section == "Precision"]
    assert [sheet.file for sheet in precision if not sheet.folded] == FILES
    assert [panel.name.text for panel in precision[0].panels] == list(GEMMS)
    assert [panel.name.text for panel in precision[2].panels] == list(OPERANDS)
    for figure in drawn(folder, only="dot_snr_db")["dot_snr_db"]:
        panel = kinds(figure)
        assert list(panel) == ["self_attention.linear_qkv", "mlp.linear_fc1"]
        axes = panel["self_attention.linear_qkv"]
        numpy.testing.assert_allclose(cells(axes), [[value(depth, step) for step in (10, 20, 30)] for depth in (0, 2, 10)])
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2", "10"] and axes.get_ylabel() == "layer"
        steps = panel["mlp.linear_fc1"].xaxis.get_major_formatter()
        assert [steps(column) for column in range(3)] == ["10", "20", "30"]


def test_all_maps_of_a_figure_share_their_colours_and_one_outlier_does_not_take_them(tmp_path):
    lines = [watched(step) for step in range(1, 41)]
    lines[7]["precision/layers.0.self_attention.linear_qkv/fprop/dot_snr_db"] = -500.0
    figures = drawn(write_run(tmp_path / "a", lines), only="dot_snr_db")["dot_snr_db"]
    limits = {axes.images[0].get_clim() for figure in figures for axes in kinds(figure).values()}
    ((low, high),) = limits
    assert -1 < low < 0.1 and 10 < high < 11


def test_what_was_not_finite_or_not_logged_is_an_empty_cell(tmp_path):
    broken = {"precision/layers.10.self_attention.linear_qkv/fprop/dot_snr_db": math.inf}
    lines = [watched(10), watched(20, **broken), watched(30)]
    del lines[2]["precision/layers.0.self_attention.linear_qkv/fprop/dot_snr_db"]
    axes = kinds(drawn(write_run(tmp_path / "a", lines), only="dot_snr_db")["dot_snr_db"][0])["self_attention.linear_qkv"]
    assert numpy.ma.getmaskarray(cells(axes)).tolist() == [[False, False, True], [False, False, False], [False, True, False]]


def test_several_groups_have_maps_each_and_those_without_figures_none(tmp_path):
    rate = {"optim": {"lr": 1.0}}
    folders = [health_run(tmp_path / "a"), health_run(tmp_path / "b", rate, offset=5.0), write_run(tmp_path / "bf16")]
    (sheet,) = (sheet for sheet in sheets(*folders) if sheet.file == "dot_snr_db")
    assert [panel.name.text for panel in sheet.panels] == [f"{gemm}, {name}" for name in "ab" for gemm in GEMMS]
    figures = drawn(*folders, only="dot_snr_db")["dot_snr_db"]
    first, second = (cells(kinds(figures[place])["mlp.linear_fc1"]) for place in (0, 3))
    numpy.testing.assert_allclose(second - first, 5.0)


def test_lines_on_demand_are_one_a_layer_coloured_by_depth(tmp_path):
    folder = health_run(tmp_path / "a")
    assert [sheet.file for sheet in sheets(folder) if sheet.folded] == [f"{file}_lines" for file in FILES]
    figure = drawn(folder, only="dot_snr_db_lines")["dot_snr_db_lines"][1]
    axes = kinds(figure)["self_attention.linear_qkv"]
    assert [list(line.get_ydata()) for line in axes.lines] == [[value(depth, step) for step in (10, 20, 30)] for depth in (0, 2, 10)]
    assert all(list(line.get_xdata()) == [step * TOKENS_PER_STEP for step in (10, 20, 30)] for line in axes.lines)
    entries = {name: handle.get_color() for name, handle in legend_of(figure.axes[0]).items()}
    assert list(entries) == ["layer 0", "layer 1", "layer 2", "layer 10"]
    assert [line.get_color() for line in axes.lines] == [entries[f"layer {depth}"] for depth in (0, 2, 10)]
    assert len(set(entries.values())) == 4 and set(entries.values()) <= set(drawing.DEPTH_COLORS)


def test_many_layers_share_colours_with_their_neighbours(tmp_path):
    lines = [record(10) | {f"precision/layers.{depth}.x/fprop/dot_snr_db": 1.0 for depth in range(150)}]
    figure = drawn(write_run(tmp_path / "a", lines), only="dot_snr_db_lines")["dot_snr_db_lines"][0]
    assert list(legend_of(figure.axes[0])) == [f"layers {first} to {first + 24}" for first in range(0, 150, 25)]


def test_lines_of_several_runs_are_mean_and_extremes_over_layers(tmp_path):
    folders = [health_run(tmp_path / "a"), health_run(tmp_path / "b", {"optim": {"lr": 1.0}}, offset=5.0), write_run(tmp_path / "bf16")]
    figure = drawn(*folders, only="dot_snr_db_lines")["dot_snr_db_lines"][0]
    axes = kinds(figure)["self_attention.linear_qkv"]
    assert [line.get_color() for line in axes.lines] == list(drawing.COLORS[:2])
    for line, band, offset in zip(axes.lines, axes.collections, (0.0, 5.0), strict=True):
        assert list(line.get_ydata()) == pytest.approx([offset + value(4, step) for step in (10, 20, 30)])
        extent = band.get_paths()[0].get_extents()
        assert (extent.ymin, extent.ymax) == pytest.approx((offset + value(0, 10), offset + value(10, 30)))
    assert {"a", "b"} <= set(legend_of(figure.axes[0])) and "bf16" not in legend_of(figure.axes[0])


def test_a_layer_without_a_finite_value_does_not_spoil_the_mean_of_the_others(tmp_path):
    broken = {"precision/layers.10.self_attention.linear_qkv/fprop/dot_snr_db": math.inf}
    folders = [health_run(tmp_path / name, {"optim": {"lr": rate}}, **broken) for rate, name in enumerate("ab")]
    line = kinds(drawn(*folders, only="dot_snr_db_lines")["dot_snr_db_lines"][0])["self_attention.linear_qkv"].lines[0]
    assert list(line.get_ydata()) == pytest.approx([value(1, step) for step in (10, 20, 30)])


def test_a_run_with_one_health_step_is_visible(tmp_path):
    single = [write_run(tmp_path / name, [record(5), watched(10)], {"optim": {"lr": rate}}) for rate, name in enumerate("ab")]
    for folders in (single[:1], single):
        for axes in kinds(drawn(*folders, only="dot_snr_db_lines")["dot_snr_db_lines"][0]).values():
            assert all(line.get_marker() == "o" for line in axes.lines)


def test_a_figure_that_no_record_measured_is_not_drawn(tmp_path):
    lines = [record(10) | {"precision/layers.0.x/fprop/dot_snr_db": None}]
    assert not [sheet for sheet in sheets(write_run(tmp_path / "a", lines)) if sheet.section == "Precision"]
