import json
import math

import pytest

from ngpt.analysis import compare, formats, results
from ngpt.analysis.groups import group_runs
from tests.unit.analysis.runs import record, summary, write_run


def groups_of(*folders):
    return group_runs(compare.load_runs(folders))


def cells(rows):
    return {row.label: [cell.text for cell in row.cells] for row in rows}


def test_final_table_of_a_finished_run(tmp_path):
    groups = groups_of(write_run(tmp_path / "a", summary=summary(), config={"parallel": {"tensor": 2}}))
    table = cells(results.final_rows(groups))
    expected = {
        "Status": "finished",
        "Parameters": "1,642,514 (1.64M)",
        "Model parallelism": "tensor 2",
        "Steps": "100",
        "Tokens trained on": "204,800 (205K)",
        "Wall time": "1 h 02 min",
        "Time in training steps": "25.0 s",
        "Tokens per second": "8,192",
        "Validation loss (nats per token)": "1.1303",
        "Validation bits per byte": "1.6307",
        "Bigram entropy of the same split (bits per byte)": "3.7121",
        "Unigram entropy of the same split (bits per byte)": "4.8732",
        "Worst unit-norm deviation, whole run": "1.2e-07",
    }
    assert {label: table[label] for label in expected} == {label: [value] for label, value in expected.items()}
    assert "MFU, last logged" not in table


def test_final_table_of_an_unfinished_run_holds_what_the_metrics_know(tmp_path):
    finished = write_run(tmp_path / "a", summary=summary())
    running = write_run(tmp_path / "b", [record(step) for step in (10, 50, 60)])
    table = cells(results.final_rows(groups_of(finished, running)))
    assert table["Steps"] == ["100", "60"]
    assert table["Wall time"] == ["1 h 02 min", formats.MISSING]
    assert table["Validation loss (nats per token)"][1] == f"{record(50)['val_loss']:.4f}"


def test_the_precision_of_a_mixed_model_names_the_recipes_of_its_layers(tmp_path):
    mixed = {"precision": {"layers": {"*.out_proj": "mxfp8", "*.mlp.*": "bf16", "*.fc1": "mxfp8"}}}
    groups = groups_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", config=mixed))
    assert cells(results.final_rows(groups))["Precision"] == ["fp32", "fp32 and mxfp8 and bf16"]


def test_the_last_loss_of_a_diverged_run_is_not_its_last_finite_one(tmp_path):
    groups = groups_of(write_run(tmp_path / "a", [record(1), record(2, train_loss=math.nan)]))
    assert cells(results.final_rows(groups))["Training loss, last (nats per token)"] == ["nan"]


def seeds(tmp_path, name="base", losses=(1.0, 1.2), **config):
    return [
        write_run(tmp_path / f"{name}_seed{seed}", summary=summary(val_loss=loss), config={"train": {"seed": seed}} | config)
        for seed, loss in enumerate(losses)
    ]


def test_seeds_are_one_column_of_means_with_their_extremes(tmp_path):
    row = next(row for row in results.final_rows(groups_of(*seeds(tmp_path))) if row.label.startswith("Validation loss"))
    assert row.cells == [results.Cell("1.1000", "1.0000 to 1.2000")]


def test_a_figure_that_a_seed_lacks_has_no_mean(tmp_path):
    first, second = (write_run(tmp_path / f"a{seed}", config={"train": {"seed": seed}}) for seed in (0, 1))
    (first / "summary.json").write_text('{"steps": 100, "status": "finished", "wall_time_s": 5.0}')
    assert cells(results.final_rows(groups_of(first, second)))["Wall time"] == ["5.0 s; –"]


def timed(folder, started, finished_at, gpus, rate):
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"started": started, "gpus": gpus}))
    (folder / "summary.json").write_text(json.dumps(summary(finished_at=finished_at, tokens_per_second=rate)))


@pytest.mark.parametrize(
    ("second_starts", "gpus", "comparable"),
    [("10:30:00", [], False), ("11:00:01", [], True), ("10:30:00", ["H100"], True)],
)
def test_no_speed_is_best_where_runs_may_have_shared_the_cores_of_a_cpu(second_starts, gpus, comparable, tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", config={"optim": {"lr": 0.5}})
    timed(first, "2026-11-30T10:00:00+00:00", "2026-11-30T11:00:00Z", gpus, 100.0)
    timed(second, f"2026-11-30T{second_starts}+00:00", "2026-11-30T12:00:00Z", gpus, 200.0)
    groups = groups_of(first, second)
    (rate,) = (row for row in results.final_rows(groups) if row.label == "Tokens per second")
    lead = results.leads(groups)[2]
    assert [cell.best for cell in rate.cells] == [False, comparable]
    assert (lead.label, lead.text) == (("Most tokens per second", "200") if comparable else ("Tokens per second", "100 to 200"))
    assert any("on CPUs at the same time and may have shared cores" in one for one in results.not_measured(groups)) != comparable
    assert (lead.note == "on CPUs at the same time") != comparable  # no run records its machine


def test_the_best_of_a_row_is_marked_where_groups_differ_in_what_can_be_better(tmp_path):
    rate = {"optim": {"lr": 0.5}}
    folders = [
        *seeds(tmp_path),
        *seeds(tmp_path, "low", (0.10, 0.12), **rate),
        write_run(tmp_path / "x", summary=summary(val_loss=math.nan)),
    ]
    marked = {row.label: [cell.best for cell in row.cells] for row in results.final_rows(groups_of(*folders))}
    assert marked["Validation loss (nats per token)"] == [False, True, False]
    assert marked["Tokens per second"] == marked["Tokens trained on"] == [False, False, False]


def test_no_mean_is_best_that_the_noise_of_seeds_explains(tmp_path):
    folders = [
        *seeds(tmp_path),
        *seeds(tmp_path, "low", (0.9, 1.2), optim={"lr": 0.5}),
        *seeds(tmp_path, "far", (9.0, 9.1), optim={"lr": 9}),
    ]
    groups = groups_of(*folders)
    (row,) = (row for row in results.final_rows(groups) if row.label.startswith("Validation loss"))
    assert not any(cell.best for cell in row.cells)
    (why,) = (one for one in results.not_measured(groups) if one.startswith("No best validation loss: "))
    assert "low (2 seeds) is lowest, but not apart from base (2 seeds) by more than the noise" in why
    assert results.leads(groups)[0].note.endswith("; within the noise of seeds")


@pytest.mark.parametrize("same", [True, False])
def test_no_loss_is_best_where_runs_were_evaluated_on_different_texts(same, tmp_path):
    folders = []
    for name, loss in (("a", 2.0), ("b", 1.0)):
        data = {part: [{"path": f"data/{'a' if same else name}/{part}", "weight": 1.0}] for part in ("train", "valid")}
        figures = summary(val_loss=loss, val_bits_per_byte=loss, train_loss=loss)
        folders.append(write_run(tmp_path / name, config={"data": data, "optim": {"clip_grad": loss}}, summary=figures))
    groups = groups_of(*folders)
    marked = {row.label: [cell.best for cell in row.cells] for row in results.final_rows(groups)}
    assert marked["Validation loss (nats per token)"] == marked["Validation bits per byte"] == [False, same]
    assert marked["Training loss, last (nats per token)"] == [False, same]
    assert any(one.startswith("No best in training loss: ") for one in results.not_measured(groups)) != same
    assert any(one.startswith("No best in validation: ") for one in results.not_measured(groups)) != same
    lead = results.leads(groups)[0]
    assert (lead.label, lead.text) == (("Lowest validation loss", "1.0000") if same else ("Validation loss", "1.0000 to 2.0000"))


def test_more_tokens_per_second_are_better(tmp_path):
    rates = {"a": 10.0, "b": 20.0, "c": 20.4}
    folders = [write_run(tmp_path / name, summary=summary(tokens_per_second=rate)) for name, rate in rates.items()]
    row = next(row for row in results.final_rows(groups_of(*folders)) if row.label == "Tokens per second")
    assert [cell.best for cell in row.cells] == [False, True, True]  # what reads the same is as good


def test_four_figures_lead_a_run(tmp_path):
    found = results.leads(groups_of(write_run(tmp_path / "a", summary=summary())))
    assert [(lead.label, lead.text, lead.note) for lead in found] == [
        ("Validation loss", "1.1303", "nats per token; 1.6307 bits per byte"),
        ("Tokens trained on", "205K", "step 100 of 100"),
        ("Tokens per second", "8,192", "MFU not known for this device"),
        ("Time in training steps", "25.0 s", "wall time 1 h 02 min"),
    ]


def test_what_was_not_measured_is_said_where_the_figure_would_stand(tmp_path):
    lines = [{"step": 10, "tokens": 20480, "train_loss": 2.5}]
    found = results.leads(groups_of(write_run(tmp_path / "a", lines)))
    assert [(lead.label, lead.text) for lead in found] == [
        ("Training loss, last", "2.5000"),
        ("Tokens trained on", "20.5K"),
        ("Tokens per second", formats.MISSING),
        ("Time in training steps", formats.MISSING),
    ]
    assert found[0].note == "nats per token; no validation was logged" and found[3].note == "wall time not known yet"


def test_the_best_of_several_groups_leads_with_its_name_and_its_distance_from_the_first(tmp_path):
    low = write_run(tmp_path / "low", None, {"optim": {"lr": 1}}, summary(val_loss=0.99, tokens_per_second=4096.0))
    folders = [*seeds(tmp_path), low]
    loss, tokens, rate, seconds = results.leads(groups_of(*folders))
    assert (loss.label, loss.text, loss.note) == (
        "Lowest validation loss",
        "0.9900",
        "low; -10.00% against base (2 seeds); within the noise of seeds",
    )
    assert (tokens.text, tokens.note) == ("205K", "step 100 of 100 each")
    assert (rate.text, rate.note) == ("8,192", "base (2 seeds)")
    assert (seconds.text, seconds.note) == ("25.0 s", "about the same in every group")


def test_absences_name_their_key_and_the_runs_where_others_have_it(tmp_path):
    health = "No health step was reached"
    bare = [{"step": 10, "tokens": 20480, "train_loss": 2.5, "val_loss": 2.6, "mfu": 0.4}]
    alone = results.not_measured(groups_of(write_run(tmp_path / "bare", bare)))
    assert [sentence.split(":")[0] for sentence in alone] == [health, "No norm deviation was logged."]
    both = results.not_measured(groups_of(tmp_path / "bare", write_run(tmp_path / "whole", [record(10, val_loss=2.6, mfu=0.4)])))
    assert both[0].startswith("bare: no health step was reached: logging.health_interval")


def test_groups_that_cannot_be_compared_are_named(tmp_path):
    folders = write_run(tmp_path / "a"), write_run(tmp_path / "b", [record(5)], {"optim": {"lr": 1}})
    assert "No loss difference of b: it shares no logged token count with a." in results.not_measured(groups_of(*folders))


def test_quantisation_errors_are_missed_only_where_something_is_quantised(tmp_path):
    folders = [write_run(tmp_path / name, config={"precision": {"name": name}}) for name in ("bf16", "nvfp4_paper")]
    found = [sentence for sentence in results.not_measured(groups_of(*folders)) if "precision.diagnostics" in sentence]
    assert found == ["nvfp4_paper: no quantisation errors: precision.diagnostics=true records them."]
