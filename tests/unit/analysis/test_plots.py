import math

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ngpt.analysis import drawing, results
from ngpt.analysis import sheets as sheet_module
from ngpt.analysis.compare import load_runs
from ngpt.analysis.groups import group_runs
from tests.unit.analysis.figures import axes_of, drawn, legend_of, sheets, values
from tests.unit.analysis.runs import SCALES, STEP_SECONDS, TOKENS_PER_STEP, record, write_run

STEPS = list(range(10, 101, 10))
TRAINING = ["loss_time", "throughput", "learning_rate", "grad_norm"]


def test_every_concern_has_a_figure_with_a_legend_and_units(tmp_path):
    figures = drawn(write_run(tmp_path / "a"))
    assert list(figures) == ["loss_tokens", *TRAINING, "norm_deviation", "hidden_norm", "scales"]
    for panels in figures.values():
        for figure in panels:
            for axes in figure.axes:
                assert axes.get_xlabel() and axes.get_ylabel() and "a" in legend_of(axes)
    assert figures["loss_time"][0].axes[0].get_xlabel() == "training time (s)"
    assert figures["norm_deviation"][0].axes[0].get_yscale() == figures["loss_tokens"][0].axes[0].get_yscale() == "log"


def test_curves_hold_the_logged_numbers_and_the_axes_cover_them(tmp_path):
    figures = drawn(write_run(tmp_path / "a"))
    training, validation = figures["loss_tokens"][0].axes[0].lines[:2]
    assert values(training) == ([step * TOKENS_PER_STEP for step in STEPS], [record(step)["train_loss"] for step in STEPS])
    assert list(validation.get_ydata()) == [record(step)["val_loss"] for step in (50, 100)]
    assert list(figures["loss_time"][0].axes[0].lines[0].get_xdata()) == pytest.approx([step * STEP_SECONDS for step in STEPS])
    for name, panels in figures.items():
        end = 100 * (STEP_SECONDS if name == "loss_time" else TOKENS_PER_STEP)
        for figure in panels:
            left, right = figure.axes[0].get_xlim()
            assert left == 0 and end <= right < 1.2 * end


def test_a_task_has_a_panel_for_each_of_its_metrics(tmp_path):
    figures = {"tasks/cloze/acc": 0.25, "tasks/cloze/acc_norm": 0.5, "tasks/copying/perplexity": 1e40, "tasks/x/exact_match/strict": 0.0}
    lines = [record(step, **(figures if step % 50 == 0 else {})) for step in STEPS]
    one, other = write_run(tmp_path / "one", lines), write_run(tmp_path / "other", config={"optim": {"lr": 1.0}})
    (sheet,) = (sheet for sheet in sheets(one, other) if sheet.file == "tasks")
    assert (sheet.title, sheet.section) == ("Tasks", "Tasks")
    drawn_axes = [figure.axes[0] for figure in drawn(one, other, only="tasks")["tasks"]]
    assert [panel.name.text for panel in sheet.panels] == ["cloze", "cloze", "copying", "x"]
    labels = [axes.get_ylabel() for axes in drawn_axes]
    assert labels[0].startswith("accuracy (") and labels[1].startswith("accuracy by length (") and labels[3] == "exact_match/strict"
    assert [axes.get_yscale() for axes in drawn_axes] == ["linear", "linear", "log", "linear"]
    for axes, value in zip(drawn_axes, figures.values(), strict=True):
        assert values(axes.lines[0]) == ([50 * TOKENS_PER_STEP, 100 * TOKENS_PER_STEP], [value, value])
        assert list(legend_of(axes)) == ["one"]  # the other run has no tasks
    assert "tasks" not in drawn(other)


def test_spikes_are_points_of_their_height_of_all_seeds_and_counted_in_the_table(tmp_path):
    def run(name, seed, **spikes):
        losses = {f"step{step}": 2.0 for step in range(1, 31)} | spikes
        lines = [record(step, train_loss=losses[f"step{step}"]) for step in range(1, 31)]
        return write_run(tmp_path / name, lines, {"train": {"seed": seed}})

    folders = [run("a_seed1", 1, step20=4.0, step25=math.nan), run("a_seed2", 2, step28=3.0)]
    (points,) = axes_of("loss_spikes", *folders).lines
    assert values(points) == ([20 * TOKENS_PER_STEP, 28 * TOKENS_PER_STEP], [2.0, 1.0])
    (row,) = (row for row in results.final_rows(group_runs(load_runs(folders))) if "Spikes" in row.label)
    assert (row.cells[0].text, row.cells[0].note) == ("2", "1 to 2")
    assert "loss_spikes" not in drawn(run("b", 1))


def test_the_start_of_a_run_is_in_the_frame_and_the_later_half_has_one_of_its_own(tmp_path):
    lines = [record(step) for step in range(1, 101)]
    folder = write_run(tmp_path / "a", lines)
    low, high = axes_of("loss_tokens", folder).get_ylim()
    assert low < lines[-1]["train_loss"] and high > lines[0]["train_loss"]
    later = axes_of("loss_end", folder)
    assert values(later.lines[0]) == ([line["tokens"] for line in lines[49:]], [line["train_loss"] for line in lines[49:]])
    assert later.get_xlim()[0] == 50 * TOKENS_PER_STEP and later.get_ylim()[1] < 2


def test_the_first_loss_that_was_not_finite_is_marked(tmp_path):
    lines = [record(step, train_loss=math.nan if step >= 30 else 2.0) for step in range(10, 60, 10)]
    axes = axes_of("loss_tokens", write_run(tmp_path / "a", lines))
    assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "x"] == [[30 * TOKENS_PER_STEP]]
    assert "first not finite" in legend_of(axes)


def test_the_lowest_validation_loss_of_all_runs_is_ringed_and_named(tmp_path):
    better = [record(step, val_loss=2.0 if step == 50 else 3.0) for step in (50, 100)]
    axes = axes_of("loss_tokens", write_run(tmp_path / "a"), write_run(tmp_path / "b", better, {"optim": {"lr": 1.0}}))
    lowest = record(100)["val_loss"]
    (ring,) = (line for line in axes.lines if line.get_markersize() == 10)
    assert values(ring) == ([100 * TOKENS_PER_STEP], [lowest]) and f"lowest validation {lowest:.4f}" in legend_of(axes)


def test_a_lowest_loss_before_the_later_half_does_not_widen_its_frame(tmp_path):
    lines = [record(step, train_loss=3.0, val_loss=1.0 if step == 20 else 3.0) for step in range(1, 101)]
    axes = axes_of("loss_end", write_run(tmp_path / "a", lines))
    assert axes.get_ylim()[0] > 2 and not any(name.startswith("lowest") for name in legend_of(axes))


def test_groups_are_compared_with_the_first_from_zero(tmp_path):
    other = [record(step, train_loss=record(step)["train_loss"] + 0.5, val_loss=None) for step in STEPS]
    folders = write_run(tmp_path / "a"), write_run(tmp_path / "b", other, {"optim": {"lr": 1.0}})
    axes = axes_of("loss_difference", *folders)
    line = next(line for line in axes.lines if len(line.get_xdata()) == len(STEPS))
    assert list(line.get_ydata()) == pytest.approx([0.5] * len(STEPS))
    assert axes.get_ylim()[0] < 0 < 0.5 < axes.get_ylim()[1]
    assert "0: a" in legend_of(axes) and "validation" not in legend_of(axes)
    relative = next(line for line in axes_of("loss_relative", *folders).lines if len(line.get_xdata()) == len(STEPS))
    assert list(relative.get_ydata()) == pytest.approx([50 / record(step)["train_loss"] for step in STEPS])


def test_one_group_and_runs_without_common_tokens_have_no_difference(tmp_path):
    first = write_run(tmp_path / "a")
    shifted = write_run(tmp_path / "b", [record(step) for step in (5, 15)], {"optim": {"lr": 1.0}})
    assert not {"loss_difference", "loss_relative"} & {sheet.file for sheet in [*sheets(first), *sheets(first, shifted)]}


@pytest.mark.parametrize("differing", [("train",), ("valid",), ("train", "valid")])
def test_no_difference_is_drawn_of_losses_on_different_texts(differing, tmp_path):
    def run(name, lr, *splits):
        data = {split: [{"path": f"data/{name if split in splits else 'same'}/{split}", "weight": 1.0}] for split in ("train", "valid")}
        return write_run(tmp_path / name, config={"optim": {"lr": lr}, "data": data})

    base, same, other = run("a", 1.0), run("b", 2.0), run("c", 3.0, *differing)
    drawn_of = {len(STEPS): "train", 2: "valid"}  # by their points
    for sheet in ("loss_difference", "loss_relative"):
        if len(differing) == 2:
            assert sheet not in {found.file for found in sheets(base, other)}
        else:
            curves = [len(line.get_xdata()) for line in axes_of(sheet, base, other).lines[1:] if len(line.get_xdata())]
            assert [drawn_of[points] for points in curves] == [split for split in ("train", "valid") if split not in differing]
    both = {len(line.get_xdata()) for line in axes_of("loss_difference", base, same).lines}
    assert set(drawn_of) <= both
    told = [one for one in results.not_measured(group_runs(load_runs([base, other]))) if "no difference is drawn" in one]
    assert [split for split in ("train", "valid") if any(f"(data.{split})" in one for one in told)] == list(differing)
    assert len(told) == len(differing)


def test_seeds_are_one_curve_in_the_band_of_their_extremes(tmp_path):
    lines = [[record(step, train_loss=2.0 + seed) for step in STEPS] for seed in range(3)]
    folders = [write_run(tmp_path / f"a{seed}", lines[seed], {"train": {"seed": seed}}) for seed in range(3)]
    axes = axes_of("loss_tokens", *folders)
    assert list(axes.lines[0].get_ydata()) == [3.0] * len(STEPS)
    extent = axes.collections[0].get_paths()[0].get_extents()
    assert (extent.ymin, extent.ymax) == (2.0, 4.0)
    assert {"a (3 seeds)", "least to largest of the seeds"} <= set(legend_of(axes))


def test_scales_are_drawn_as_mean_and_band_with_their_symbols(tmp_path):
    folder = write_run(tmp_path / "a")
    (sheet,) = (sheet for sheet in sheets(folder) if sheet.file == "scales")
    assert [(panel.name.key, *panel.name.symbol) for panel in sheet.panels] == [
        ("attn_alpha", "α", "A"),
        ("mlp_alpha", "α", "M"),
        ("sqk", "s", "qk"),
        ("suv", "s", "uv"),
        ("sz", "s", "z"),
    ]
    for number, figure in enumerate(drawn(folder, only="scales")["scales"], start=1):
        (axes,) = figure.axes
        assert axes.lines[0].get_ydata()[-1] == number
        band = axes.collections[0].get_paths()[0].get_extents()
        assert (band.ymin, band.ymax) == (0.5 * number, 2.0 * number)


def test_each_group_keeps_its_colour_and_its_name_is_written_as_it_is(tmp_path):
    names = ["plain", "_hidden_by_matplotlib", "$not$mathematics"]
    folders = [write_run(tmp_path / name, config={"optim": {"lr": number}}) for number, name in enumerate(names)]
    for file, panels in drawn(*folders).items():
        for figure in panels:
            entries = {name: handle.get_color() for name, handle in legend_of(figure.axes[0]).items() if name in names}
            first = 1 if file in ("loss_difference", "loss_relative") else 0
            assert entries == dict(list(zip(names, drawing.COLORS, strict=False))[first:])
            children = (child for child in figure.axes[0].get_children() if hasattr(child, "legend_handles"))
            assert not any(text.get_parse_math() for child in children for text in child.get_texts())


def test_norm_deviations_fill_their_frame_and_a_limit_beyond_it_is_named(tmp_path):
    lines = [record(step, worst_norm_deviation=step * 1e-9) for step in STEPS]
    axes = axes_of("norm_deviation", write_run(tmp_path / "a", lines))
    low, high = axes.get_ylim()
    assert 5e-9 < low < 1e-8 and 1e-7 < high < 2e-7
    assert "limit 0.0001, above this frame" in legend_of(axes)
    assert axes_of("norm_deviation", tmp_path / "a").lines[0].get_xdata()[0] == 10 * TOKENS_PER_STEP


def test_a_deviation_of_exactly_zero_is_drawn_at_the_lower_end(tmp_path):
    lines = [record(10, worst_norm_deviation=0.0), record(20)]
    axes = axes_of("norm_deviation", write_run(tmp_path / "a", lines))
    assert list(axes.lines[0].get_ydata()) == [drawing.SMALLEST, 1.2e-7]


def test_limits_of_the_config_are_drawn_only_where_runs_agree(tmp_path):
    lines = [record(step, grad_norm=step / 50) for step in STEPS]
    first = write_run(tmp_path / "a", lines)
    axes = axes_of("grad_norm", first)
    assert "clipped above 1" in legend_of(axes) and list(axes.lines[1].get_ydata()) == [1, 1]
    second = write_run(tmp_path / "b", lines, {"optim": {"clip_grad": 0.5}})
    assert set(legend_of(axes_of("grad_norm", first, second))) == {"a", "b"}


def test_hidden_norms_are_deviations_for_ngpt_and_norms_for_its_control(tmp_path):
    hidden = {"health/hidden_norm/mean": 1.5, "health/hidden_norm/min": 0.25, "health/hidden_norm/max": 1.5}
    lines = [record(step, **hidden) for step in (10, 20)]
    sphere, control = (write_run(tmp_path / name, lines, {"model": {"architecture": name}}) for name in ("ngpt", "gpt"))
    farthest, mean = axes_of("hidden_norm", sphere, control).lines
    assert list(farthest.get_ydata()) == [0.75, 0.75] and list(mean.get_ydata()) == [0.5, 0.5]
    assert list(axes_of("hidden_norm_control", sphere, control).lines[0].get_ydata()) == [1.5, 1.5]
    assert axes_of("hidden_norm", control).get_ylabel() == "‖h‖"


def test_routers_have_a_section_of_their_own_with_their_unit(tmp_path):
    load = {"health/expert_load/mean": 2.0, "health/expert_load/min": 1.5, "health/expert_load/max": 4.0, "aux_loss": 1.1}
    folder = write_run(tmp_path / "a", [record(step, **load) for step in STEPS])
    experts = [sheet for sheet in sheets(folder) if sheet.section == "Experts"]
    assert [sheet.file for sheet in experts] == ["expert_load", "aux_loss"]
    axes = axes_of("expert_load", folder)
    assert axes.get_ylabel() == "busiest / average expert" and "1: balanced" in legend_of(axes)
    (scales,) = (sheet for sheet in sheets(folder) if sheet.file == "scales")
    assert len(scales.panels) == len(SCALES)


def test_a_control_without_norms_and_scales_has_no_empty_figures(tmp_path):
    keys = ("step", "tokens", "train_loss", "step_time_s")
    folder = write_run(tmp_path / "a", [{key: record(step)[key] for key in keys} for step in (10, 20)])
    assert [sheet.file for sheet in sheets(folder)] == ["loss_tokens", "loss_time"]


def test_a_run_with_one_record_is_visible(tmp_path):
    for panels in drawn(write_run(tmp_path / "a", [record(10)])).values():
        for figure in panels:
            assert any(line.get_marker() not in ("None", "") for line in figure.axes[0].lines)


def test_nothing_in_a_png_is_printed_over_something_else(tmp_path):
    """Titles, legends and axes of the sheet with the most panels, for runs with long names."""
    names = [f"{letter}_name_that_is_longer_than_any_legend_has_room_for" for letter in "abcd"]
    folders = [write_run(tmp_path / name, config={"optim": {"lr": number}}) for number, name in enumerate(names)]
    (sheet,) = (sheet for sheet in sheets(*folders) if sheet.file == "scales")
    with matplotlib.rc_context(drawing.STYLE):
        figure = sheet_module.grid(sheet)
        FigureCanvasAgg(figure).draw()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    boxes += [child.get_window_extent() for axes in figure.axes for child in axes.get_children() if hasattr(child, "legend_handles")]
    cells = [part for row in figure.subfigs for part in (row, *row.subfigs)]
    boxes += [text.get_window_extent() for cell in cells for text in cell.texts]
    assert len(boxes) == 5 * 4 + 1  # axes, names, styles and title of each panel, and the title of the sheet
    for index, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
