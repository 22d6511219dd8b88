import base64
import math

import pytest
from matplotlib.figure import Figure

from ngpt.analysis import compare, drawing, layer_panels, plots
from ngpt.analysis.report import write_report
from tests.unit.analysis.runs import TOKENS_PER_STEP, record, write_run

GEMMS, OPERANDS = ("fprop", "dgrad", "wgrad"), ("input", "weight", "grad_output")  # as diagnostics name them
LINEARS = {0: "self_attention.linear_qkv", 1: "mlp.linear_fc1", 2: "self_attention.linear_qkv", 10: "self_attention.linear_qkv"}


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


def health_run(path, **options):
    """Figures at every second record, as where health steps are rarer than logged steps."""
    return write_run(path, [line for step in (10, 20, 30) for line in (record(step - 5), watched(step, **options))])


@pytest.fixture
def drawn(monkeypatch):
    """The figures by file name as they are when saved; they are not rendered."""
    figures = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.update({path.stem: figure}))
    return figures


def panels(figure: Figure) -> dict[str, object]:
    """The axes by title; the colour bar has none."""
    return {axes.get_title("left"): axes for axes in figure.axes if axes.get_title("left")}


def test_layers_are_grouped_by_kind_in_the_order_of_the_model():
    keys = [f"precision/layers.{depth}.{linear}/fprop/dot_snr_db" for depth, linear in reversed(LINEARS.items())]
    keys += ["precision/layers.3.mlp.experts.7.linear_fc1/fprop/dot_snr_db", "precision/layers.4.x/fprop/dot_snr_db_lower"]
    keys += ["precision/layers.5.x/input/dot_snr_db", "health/sz/mean", "train_loss"]
    found = layer_panels.find_layers(keys, "dot_snr_db", ("fprop", "dgrad"))
    assert list(found) == ["self_attention.linear_qkv", "mlp.linear_fc1", "mlp.experts.linear_fc1"]
    assert found["self_attention.linear_qkv"] == {
        "fprop": [(depth, f"precision/layers.{depth}.self_attention.linear_qkv/fprop") for depth in (0, 2, 10)]
    }


def test_one_run_has_a_line_a_layer_with_its_numbers_coloured_by_depth(tmp_path, drawn):
    written = plots.write_plots([compare.load_run(health_run(tmp_path / "a"))], tmp_path)
    precision = [(plot.path.stem, plot.wide) for plot in written if plot.section == "Precision"]
    assert precision == [("dot_snr_db", True), ("relative_error", True), ("signal_correlation", True)]
    cells = panels(drawn["dot_snr_db"])
    assert list(cells) == [f"{kind}: {gemm}" for kind in ("self_attention.linear_qkv", "mlp.linear_fc1") for gemm in GEMMS]
    assert list(panels(drawn["relative_error"]))[:3] == [f"self_attention.linear_qkv: {operand}" for operand in OPERANDS]
    lines = cells["self_attention.linear_qkv: dgrad"].lines
    assert [list(line.get_ydata()) for line in lines] == [[value(depth, step) for step in (10, 20, 30)] for depth in (0, 2, 10)]
    assert all(list(line.get_xdata()) == [step * TOKENS_PER_STEP for step in (10, 20, 30)] for line in lines)
    assert len({line.get_color() for line in lines}) == 3
    assert [axes.get_ylabel() for axes in drawn["dot_snr_db"].axes if axes not in cells.values()] == ["layer"]
    for axes in cells.values():
        left, right = axes.get_xlim()
        assert left == 0 and 30 * TOKENS_PER_STEP <= right < 40 * TOKENS_PER_STEP


def test_errors_are_drawn_in_grey_with_the_correlation_of_the_signal(tmp_path, drawn):
    plots.write_plots([compare.load_run(health_run(tmp_path / "a"))], tmp_path)
    lines = panels(drawn["signal_correlation"])["mlp.linear_fc1: wgrad"].lines
    assert [(line.get_ydata()[0], line.get_color() == drawing.GREY) for line in lines] == [(0.01, True), (0.5, False)]


def test_several_runs_are_compared_by_mean_and_extremes_over_layers(tmp_path, drawn):
    runs = compare.load_runs([health_run(tmp_path / "a"), health_run(tmp_path / "b", offset=5.0), write_run(tmp_path / "bf16")])
    plots.write_plots(runs, tmp_path)
    axes = panels(drawn["dot_snr_db"])["self_attention.linear_qkv: fprop"]
    lines = [line for line in axes.lines if len(line.get_ydata())]
    assert [line.get_color() for line in lines] == list(drawing.COLORS[:2])
    for line, band, offset in zip(lines, axes.collections, (0.0, 5.0), strict=False):
        assert list(line.get_ydata()) == pytest.approx([offset + value(4, step) for step in (10, 20, 30)])
        extent = band.get_paths()[0].get_extents()
        assert (extent.ymin, extent.ymax) == pytest.approx((offset + value(0, 10), offset + value(10, 30)))
    assert [text.get_text() for text in drawn["dot_snr_db"].legends[0].get_texts()] == ["a", "b"]


def test_a_layer_without_a_finite_value_does_not_spoil_the_mean_of_the_others(tmp_path, drawn):
    broken = {"precision/layers.10.self_attention.linear_qkv/fprop/dot_snr_db": math.inf}
    plots.write_plots(compare.load_runs([health_run(tmp_path / name, **broken) for name in "ab"]), tmp_path)
    line = panels(drawn["dot_snr_db"])["self_attention.linear_qkv: fprop"].lines[0]
    assert list(line.get_ydata()) == pytest.approx([value(1, step) for step in (10, 20, 30)])


def test_a_run_with_one_health_step_is_visible(tmp_path, drawn):
    single = [write_run(tmp_path / name, [record(5), watched(10)]) for name in "ab"]
    for runs in (single[:1], single):
        plots.write_plots(compare.load_runs(runs), tmp_path)
        for axes in panels(drawn["dot_snr_db"]).values():
            assert all(line.get_marker() == "o" for line in axes.lines)


def test_the_page_has_a_section_for_precision_only_where_there_is_something_to_show(tmp_path, monkeypatch):
    # Images that hold their names: rendering takes most of the time.
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: path.write_bytes(path.stem.encode()))
    with_precision, without = (write_report([run(tmp_path / name)]).read_text() for name, run in (("a", health_run), ("b", write_run)))
    assert "<h2>Precision</h2>" in with_precision and "<h2>Precision</h2>" not in without
    shown = [base64.b64encode(stem).decode() for stem in (b"dot_snr_db", b"relative_error", b"signal_correlation")]
    places = [with_precision.index(f"base64,{image}") for image in shown]
    assert places == sorted(places) and places[0] > with_precision.index("<h2>Precision</h2>")
    assert not any(image in without for image in shown)
