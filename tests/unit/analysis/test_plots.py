import math

import pytest
from matplotlib.figure import Figure

from ngpt.analysis import compare, drawing, plots
from tests.unit.analysis.runs import SCALES, STEP_SECONDS, TOKENS_PER_STEP, record, write_run


@pytest.fixture
def drawn(monkeypatch):
    """The figures by file name as they are when saved; they are not rendered, which takes most of the time."""
    figures = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.update({path.stem: figure}))
    return figures


def texts(axes):
    return {text.get_text() for text in axes.texts}


def test_every_concern_has_a_figure_with_titles_and_units(tmp_path, drawn):
    written = plots.write_plots([compare.load_run(write_run(tmp_path / "a"))], tmp_path)
    names = ["loss_tokens", "loss_time", "learning_rate", "grad_norm", "throughput", "norm_deviation", "hidden_norm", "scales"]
    assert [plot.path.stem for plot in written] == names
    for figure in drawn.values():
        for axes in figure.axes:
            assert axes.get_title("left") and axes.get_xlabel() and axes.get_ylabel()
    assert drawn["loss_time"].axes[0].get_xlabel() == "training time (s)"
    assert drawn["norm_deviation"].axes[0].get_yscale() == "log"


def test_curves_hold_the_logged_numbers_and_the_axes_cover_them(tmp_path, drawn):
    plots.write_plots([compare.load_run(write_run(tmp_path / "a"))], tmp_path)
    steps = list(range(10, 101, 10))
    training, validation = drawn["loss_tokens"].axes[0].lines[:2]
    assert list(training.get_xdata()) == [step * TOKENS_PER_STEP for step in steps]
    assert list(training.get_ydata()) == [record(step)["train_loss"] for step in steps]
    assert list(validation.get_ydata()) == [record(step)["val_loss"] for step in (50, 100)]
    assert list(drawn["loss_time"].axes[0].lines[0].get_xdata()) == pytest.approx([step * STEP_SECONDS for step in steps])
    for name, figure in drawn.items():
        end = 100 * (STEP_SECONDS if name == "loss_time" else TOKENS_PER_STEP)
        for axes in figure.axes:
            left, right = axes.get_xlim()
            assert left == 0 and end <= right < 1.2 * end


def test_scales_are_drawn_as_mean_and_band(tmp_path, drawn):
    plots.write_plots([compare.load_run(write_run(tmp_path / "a"))], tmp_path)
    for number, (scale, axes) in enumerate(zip(SCALES, drawn["scales"].axes, strict=True), start=1):
        assert axes.get_title("left").startswith(scale)
        assert axes.lines[0].get_ydata()[-1] == number
        band = axes.collections[0].get_paths()[0].get_extents()
        assert (band.ymin, band.ymax) == (0.5 * number, 2.0 * number)


def test_each_run_keeps_its_colour_and_its_name_is_written_as_it_is(tmp_path, drawn):
    names = ["plain", "_hidden_by_matplotlib", "$not$mathematics"]
    plots.write_plots([compare.load_run(write_run(tmp_path / name)) for name in names], tmp_path)
    for stem, figure in drawn.items():
        labels = figure.legends[0].get_texts() if stem == "scales" else [text for text in figure.axes[0].texts if text.get_text() in names]
        assert {label.get_text(): label.get_color() for label in labels} == dict(zip(names, drawing.COLORS, strict=False))
        assert not any(label.get_parse_math() for label in labels)


def test_names_at_the_ends_of_equal_curves_do_not_overlap(tmp_path, drawn):
    plots.write_plots([compare.load_run(write_run(tmp_path / f"run{number}")) for number in range(6)], tmp_path)
    for stem in set(drawn) - {"scales"}:
        heights = sorted(text.get_position()[1] for text in drawn[stem].axes[0].texts if text.get_text().startswith("run"))
        assert len(heights) == 6
        assert all(high - low >= 0.06 for low, high in zip(heights, heights[1:], strict=False))
        assert -0.01 <= heights[0] and heights[-1] <= 1.01


def test_the_start_leaves_the_frame_and_a_divergence_does_not(tmp_path, drawn):
    lines = [record(step) for step in range(1, 100)]
    plots.write_plots([compare.load_run(write_run(tmp_path / "a", lines))], tmp_path)
    assert drawn["loss_tokens"].axes[0].get_ylim()[1] < lines[0]["train_loss"]
    plots.write_plots([compare.load_run(write_run(tmp_path / "b", [*lines, record(100, train_loss=20.0)]))], tmp_path)
    assert drawn["loss_tokens"].axes[0].get_ylim()[1] > 20.0


def test_the_first_loss_that_was_not_finite_is_marked(tmp_path, drawn):
    lines = [record(step, train_loss=math.nan if step >= 30 else 2.0) for step in range(10, 60, 10)]
    plots.write_plots([compare.load_run(write_run(tmp_path / "a", lines))], tmp_path)
    crosses = [list(line.get_xdata()) for line in drawn["loss_tokens"].axes[0].lines if line.get_marker() == "x"]
    assert crosses == [[30 * TOKENS_PER_STEP]]


def test_limits_of_the_config_are_drawn_only_where_runs_agree(tmp_path, drawn):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", config={"debug": {"norm_tolerance": 1e-3}})
    plots.write_plots(compare.load_runs([first, second]), tmp_path)
    assert "clipped above 1" in texts(drawn["grad_norm"].axes[0])
    assert texts(drawn["norm_deviation"].axes[0]) == {"a", "b"}


def test_a_control_without_norms_and_scales_has_no_empty_figures(tmp_path, drawn):
    keys = ("step", "tokens", "train_loss", "step_time_s")
    lines = [{key: record(step)[key] for key in keys} for step in (10, 20)]
    assert [plot.path.stem for plot in plots.write_plots([compare.load_run(write_run(tmp_path / "a", lines))], tmp_path)] == [
        "loss_tokens",
        "loss_time",
    ]


def test_a_run_with_one_record_is_visible(tmp_path, drawn):
    plots.write_plots([compare.load_run(write_run(tmp_path / "a", [record(10)]))], tmp_path)
    for figure in drawn.values():
        for axes in figure.axes:
            assert any(line.get_marker() not in ("None", "") for line in axes.lines)


def test_hidden_norms_that_differ_by_rounding_do_not_fill_the_frame(tmp_path, drawn):
    plots.write_plots([compare.load_run(write_run(tmp_path / "a"))], tmp_path)
    low, high = drawn["hidden_norm"].axes[0].get_ylim()
    assert low < 0.995 and high > 1.005
