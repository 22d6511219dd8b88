"""From run folders to results and a page, with losses whose differences are known."""

import copy
import dataclasses
import html
import itertools
import json
import math
import re
import shutil
from itertools import pairwise

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from launch import cli
from ngpt.analysis import drawing, sheets
from ngpt.analysis.intervals import Interval
from ngpt.config.errors import ConfigError
from ngpt.config.study import Measure, load_study, studies
from ngpt.study import results
from ngpt.study.analyses import has_result
from ngpt.study.axis_figures import averaging_model
from ngpt.study.cells import _TAKEN, comparison_tables, number, unbounded_notes
from ngpt.study.design import design_rows, provenance_rows
from ngpt.study.drawing import left_out
from ngpt.study.figures import absent, sheets_of
from ngpt.study.judgement import verdict_reason, verdict_tables
from ngpt.study.page import write_page
from ngpt.study.plan import plan
from tests.unit.analysis.runs import record, summary, write_run
from tests.unit.study.studies import TEXT, planned

FIGURES = """\
figures:
  - {title: How large the gap is, kind: intervals, of: [gap]}
  - {title: The gap, kind: tokens, of: [gap]}
  - {title: Over the width, kind: axis, of: [widths, gain], over: model.hidden_size, model: averaging, rho: [rho, rho_noise]}
  - {title: Layers, kind: layers, of: [gain]}
"""
MEASURES = """\
  gain: {source: snr, key: "linears/*/gain", unit: dB}
  rho: {source: snr, key: "linears/*/rho"}
  rho_noise: {source: snr, key: "linears/*/noise"}
comparisons:
  widths: {measure: loss, arms: [wide]}
  gain: {measure: gain, arms: [wide]}
"""
SHOWN = TEXT.replace("comparisons:\n", MEASURES).replace("figures:\n  - {title: The gap, kind: tokens, of: [gap]}\n", FIGURES)


@pytest.fixture
def study(tmp_path):
    """The runs of the small study: the recipe costs 0.1 and 0.2 nats, one wide run has failed, and another's analysis is missing."""
    plan, folder = planned(tmp_path, text=SHOWN), tmp_path / "out"
    for run in plan.runs:
        if run.name == "wide/hidden_size=128_seed=2":
            continue
        cost = 0.1 * run.seed if "nvfp4" in run.arm else 0.0
        losses = [record(step, val_loss=4.0 - step / 100 + 0.01 * run.seed + cost) for step in (2, 4, 8)]
        status = "stopped" if run.arm == "gpt_trunk" else "finished"
        write_run(folder / run.name, losses, summary=summary(status=status, steps=8))
    for analysis in plan.analyses[:3]:
        path = folder / analysis.file
        path.parent.mkdir(parents=True, exist_ok=True)
        layers = {f"layers.{layer}.qkv": {"gain": {"value": 6.0 + layer}, "rho": {"value": 0.02}, "noise": 1e-4} for layer in (0, 1)}
        path.write_text(json.dumps({"results": {"linears": layers}}))
    return plan, folder


def gathered(study):
    plan, folder = study
    provenance = {"git": {"commit": "0123abcd", "dirty": False}, "versions": {"numpy": "2"}, "gpus": []}
    return results.gather(plan, folder, "A study of tests.", "ngpt study mine --size small", provenance)


def test_results_hold_the_numbers_their_definitions_and_what_is_missing(study):
    found = gathered(study)
    (row,) = [row for row in found["comparisons"]["gap"]["rows"] if row["arm"] == "gpt_nvfp4_nvidia"]
    assert row["by_seed"] == {"1": pytest.approx(0.1), "2": pytest.approx(0.2)}
    assert row["interval"]["estimate"] == pytest.approx(0.15)
    assert row["interval"]["high"] == pytest.approx(0.15 + 12.7062 * 0.05)  # Student's t of one degree of freedom
    (curve,) = [curve for curve in found["comparisons"]["gap"]["curves"] if curve["arm"] == "gpt_nvfp4_nvidia"]
    assert [place["estimate"] for place in curve["places"]] == pytest.approx([0.15] * 3)
    assert found["verdict"]["result"] == "undecided"
    assert found["study"]["claim"] == "It works." and found["study"]["lists"]["width"] == [64, 128]
    (run,) = [run for run in found["runs"] if run["name"] == "gpt_trunk/seed=1"]
    assert (run["status"], run["measures"]["loss"]) == ("stopped", pytest.approx(3.93)) and "train.seed=1" in run["words"]
    (wide,) = [run for run in found["runs"] if run["name"] == "wide/hidden_size=64_seed=1"]
    assert wide["measures"]["gain"] == pytest.approx(6.5) and wide["layers"]["rho"] == {"layers.0.qkv": 0.02, "layers.1.qkv": 0.02}
    assert found["missing"] == ["wide/hidden_size=128_seed=2: missing", f"{study[0].analyses[-1].file}: not there"]
    assert results.gather(*study, "", "", {})["comparisons"] == found["comparisons"]


def test_the_page_is_a_function_of_the_results_alone(study, tmp_path):
    plan, folder = study
    results.write(gathered(study), folder / "results.json")
    first = write_page(results.read(folder / "results.json"), folder).read_text(encoding="utf-8")
    alone = tmp_path / "elsewhere" / "results.json"
    alone.parent.mkdir()
    alone.write_bytes((folder / "results.json").read_bytes())
    second = write_page(results.read(alone), alone.parent)
    assert second.read_text(encoding="utf-8") == first
    figures = ("1_intervals", "2_tokens", "3_axis", "4_layers")
    assert {f"{name}.{kind}" for name in figures for kind in ("png", "svg")} <= {path.name for path in alone.parent.iterdir()}
    assert not re.search(r"(src|href)=[\"'](?!#)", first)  # nothing is fetched
    assert first.count("<svg") == 5 and "-0.4853 to 0.7853" in first and "2 runs or analyses are missing" in first
    assert "reproduced if the whole interval is above 0; not reproduced if none of it is; else undecided" in first


def test_a_verdict_names_its_rule_and_the_numbers_it_rests_on(study):
    study[0].study.verdict[0].arms = ["gpt_nvfp4*"]
    found = gathered(study)
    (table,) = verdict_tables(found)
    assert table["heads"] == ["nats", "95 % interval", "seeds", "result"]
    (row,) = table["rows"]
    assert row["cells"] == ["0.1500", "-0.4853 to 0.7853", "2", "undecided: one part of the interval is above 0, another is not"]
    assert row["against"] == "less gpt_bf16" and verdict_reason(found) == "Its rule is undecided: gap."
    found["comparisons"]["gap"]["rows"][0]["interval"] |= {"shape": "all", "low": None, "high": None}
    assert verdict_tables(found)[0]["rows"][0]["cells"][1:] == ["excludes nothing", "2", "undecided: the interval excludes nothing"]
    found["comparisons"]["gap"]["rows"][0]["by_seed"] = {}
    assert verdict_tables(found)[0]["rows"][0]["cells"][1:] == ["–", "0", "undecided: no seed has the numbers"]


@pytest.mark.parametrize(
    ("losses", "result", "reason", "row"),
    [
        (["reproduced", "reproduced"], "reproduced", "All 2 rules hold.", "reproduced: all of the interval is above 0"),
        (
            ["not reproduced", "undecided"],
            "not reproduced",
            "1 of 2 rules is contrary: gap.",
            "not reproduced: none of the interval is above 0",
        ),
    ],
)
def test_a_verdict_names_the_rules_that_gave_it(study, losses, result, reason, row):
    found = gathered(study)
    (definition,), (rule,) = found["study"]["verdict"], found["verdict"]["rules"]
    rules = [rule | {"result": one, "rows": [each | {"result": one} for each in rule["rows"]]} for one in losses]
    found["study"]["verdict"], found["verdict"] = [definition, definition], {"result": result, "rules": rules}
    assert verdict_reason(found) == reason
    assert verdict_tables(found)[0]["rows"][0]["cells"][-1] == row


def test_a_verdict_says_of_which_scanned_values_it_speaks(tmp_path):
    """A size with one width may hold where the claim of all widths is undecided."""
    text = SHOWN.replace("{comparison: gap, must: be_above, value: 0.0}", "{comparison: widths, must: be_above, value: 0.0}")
    for word, places in (("width=[128]", "128 alone"), ("width=[64,128,256]", "64, 128 and 256")):
        plan = planned(tmp_path, word, text=text)
        for run in plan.runs:
            write_run(tmp_path / word / run.name, [record(8, val_loss=4.0 + 0.01 * run.seed)], summary=summary(status="finished", steps=8))
        found = gathered((plan, tmp_path / word))
        assert found["verdict"]["result"] == "reproduced"
        assert verdict_reason(found) == f"Its rule holds. It speaks of hidden_size {places}."


def test_the_design_says_what_tells_arms_apart(study):
    rows = dict(design_rows(gathered(study)))
    assert rows["GPT, nvfp4_nvidia"] == "experiment=gpt_tiny precision=nvfp4_nvidia"
    assert rows["wide"] == "experiment=ngpt_tiny" and rows["Scan of model.hidden_size"] == "64, 128"
    assert rows["All arms"] == "train.steps=8 optim.lr=1e-3"
    assert rows["Size"] == "small"  # which says nothing
    study[0].study.sizes["small"].says = "Of tests."
    assert dict(design_rows(gathered(study)))["Size"] == "small: Of tests."
    assert rows["Seeds"].startswith("2 an arm (train.seed 1, 2).") and rows["Left out"] == "The study names nothing"


def test_words_that_follow_the_scan_are_told_with_their_place():
    study = {"sizes": {"s": {"says": ""}}, "arms": {"a": {"label": "A", "until": None}}, "tuning": "", "left_out": "rates"}
    runs = [
        {"arm": "a", "point": {"width": width}, "seed": 1, "tokens": 5, "words": ["x=1", f"width={width}", f"lr={rate}", "train.seed=1"]}
        for width, rate in ((64, 0.1), (128, 0.2))
    ]
    rows = dict(design_rows({"study": study, "size": "s", "runs": runs}))
    assert rows["A"] == "lr=0.1 at width 64; lr=0.2 at width 128"
    assert rows["All arms"] == "x=1" and rows["Left out"] == "rates"


def test_code_and_devices_of_the_runs_and_of_the_results_are_told():
    git, versions = {"commit": "0123abcd", "dirty": True}, {"torch": "2.11.0", "triton": None}
    runs = [{"provenance": {"git": git, "versions": versions, "gpus": ["H200", "H200"]}}, {"provenance": {}}]
    rows = provenance_rows({"runs": runs, "provenance": {"git": None, "versions": {}, "gpus": []}})
    assert rows == [("Runs", "commit 0123abcd, with uncommitted changes; H200; torch 2.11.0"), ("Results", "commit unknown")]


def test_each_cell_says_the_heading_of_its_column(study, tmp_path):
    """On a narrow screen the row of headings is not shown."""
    page = write_page(gathered(study), tmp_path / "page").read_text(encoding="utf-8")
    tables = re.findall(r'<table class="[^"]*stack">.*?</table>', page, re.DOTALL)
    assert len(tables) == page.count("<table") == 5
    for table in tables:
        heads = re.findall('<th scope="col">(.*?)</th>', table)
        rows = [re.findall('data-head="(.*?)"', row) for row in table.split("<tbody>")[1].split("</tr>")[:-1]]
        assert heads and rows and all(row == heads for row in rows)


def test_a_table_with_the_rows_of_an_earlier_one_is_left_out(study):
    found = gathered(study)
    for part in (found["study"]["comparisons"], found["comparisons"]):
        part["again"] = part["gain"]
    assert [table["title"] for table in comparison_tables(found)].count("gain") == 1
    assert "again" not in [table["title"] for table in comparison_tables(found)]


def test_equal_numbers_of_another_measure_and_what_a_rule_judges_stay(study):
    """As in the study of stability, where divergence and loss spikes are all zero."""
    found = gathered(study)
    titles = [table["title"] for table in comparison_tables(found)]
    found["study"]["comparisons"]["other"] = found["study"]["comparisons"]["gain"] | {"measure": "rho"}
    found["study"]["comparisons"]["judged"] = found["study"]["comparisons"]["gain"]
    found["comparisons"] |= dict.fromkeys(("other", "judged"), found["comparisons"]["gain"])
    found["verdict"]["rules"].append(found["verdict"]["rules"][0] | {"comparison": "judged"})
    assert [table["title"] for table in comparison_tables(found)] == [*titles, "other", "judged"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (23.4, "23.40"),
        (1e-4, "0.0001000"),
        (3.0, "3"),
        (1234.5, "1234"),
        (12345.0, "12345"),
        (-20480, "-20480"),
        (1e15, "1e+15"),
        (math.inf, "inf"),
        (None, "–"),
        (0.0, "0"),
        (-0.0, "0"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        ({}, []),
        ({"shape": "all", "low": None, "high": None}, ["“Excludes nothing”"]),
        ({"shape": "outside"}, ["“Up to A, and from B on”"]),
        ({"high": None}, ["“From A on” and “up to B”"]),
    ],
)
def test_intervals_without_two_ends_are_explained_where_there_are_any(changes, starts):
    interval = Interval(0.0, -1.0, 2.0, 3, "").to_json()
    rows = [{"interval": interval, "by_seed": {"1": 0.0}}, {"interval": interval | changes, "by_seed": {"1": 0.0}}]
    notes = unbounded_notes({"comparisons": {"gap": {"rows": rows}}})
    assert [note.partition(":")[0].partition(" have")[0] for note in notes] == starts


def test_what_has_no_end_is_told_so(study, tmp_path):
    found = gathered(study)
    found["study"]["figures"] = found["study"]["figures"][:1]
    rows = found["comparisons"]["gap"]["rows"]
    rows[0]["interval"] |= {"shape": "outside", "low": -1.0, "high": 2.0}
    page = write_page(found, tmp_path / "page").read_text(encoding="utf-8")
    assert "up to -1, and from 2 on" in page and "excludes -1 to 2 alone" in page
    assert "only what lies between A and B is excluded" in page and "such an interval is a dashed line" in page
    rows[0]["interval"] |= {"shape": "all", "low": None, "high": None}
    page = write_page(found, tmp_path / "page").read_text(encoding="utf-8")
    assert "excludes nothing" in page and "the data exclude nothing" in page


def test_a_size_that_judges_nothing_gives_no_verdict(study):
    study[0].study.sizes["small"].judges = False
    found = gathered(study)
    assert found["verdict"]["result"] == "not judged" and found["verdict"]["rules"][0]["result"] == "undecided"
    assert verdict_reason(found) == "Size small has no verdict."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ("[1]", "format list.*Give the"),
        ("{}", "format None.*Give the"),
        ('{"format": 99}', "format 99.*Use the version"),
        ('{"format": 1}', "No name.*Restore it"),
    ],
)
def test_files_that_are_no_results_are_told(tmp_path, text, message):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        results.read(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"runs": 3}, "runs is int. "),
        ({"runs": None}, "runs is NoneType. "),
        ({"runs": [{}]}, "KeyError: 'arm'. "),
        ({"runs": [3]}, "TypeError: "),
        ({"comparisons": {}}, "KeyError: "),
        ({"verdict": {"result": "not judged", "rules": []}}, "ValueError: "),
    ],
)
def test_results_that_lack_what_the_page_shows_are_one_line(study, tmp_path, capsys, change, told):
    path = tmp_path / "damaged" / "results.json"
    path.parent.mkdir()
    results.write(gathered(study) | change, path)
    assert cli.main(["study", "--report", str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"{path}: {told}") and shown.err.endswith("Restore it\n") and shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_page_is_written_beside_results_of_a_study_alone_and_for_the_study_that_is_named(study, tmp_path, capsys):
    kept = tmp_path / "kept" / "evidence.json"
    kept.parent.mkdir()
    results.write(gathered(study), kept)
    assert cli.main(["study", "--report", str(kept)]) == 2
    assert capsys.readouterr().err.startswith(f"--report: {kept}. Only the page of a results.json")
    own = kept.rename(kept.with_name("results.json"))
    assert cli.main(["study", "another", "--report", str(own)]) == 2
    assert "It is of the study mine, and another was asked for" in capsys.readouterr().err
    assert list(kept.parent.iterdir()) == [own]
    assert cli.main(["study", "mine", "--report", str(own)]) == 0 and (kept.parent / "index.html").exists()
    own.rename(kept)
    assert cli.main(["study", "--report", str(kept), "--out", str(tmp_path / "page")]) == 0 and (tmp_path / "page/index.html").exists()
    assert cli.main(["study", "gap", "--report", "--out", str(tmp_path / "none")]) == 2
    assert "No such folder: nothing of this study has run there. Run it first" in capsys.readouterr().err


def test_an_arm_whose_reference_does_not_belong_to_the_size_has_no_row(tmp_path):
    found = planned(tmp_path, size="large", text=TEXT.replace('arms: ["gpt_*bf16", wide]', 'arms: ["gpt_nvfp4*"]'))
    gathered = results.gather(found, tmp_path / "none", "", "ngpt study mine", {})
    assert gathered["comparisons"]["gap"] == {"rows": [], "curves": []} and gathered["verdict"]["result"] == "undecided"
    assert write_page(gathered, tmp_path).exists()


def test_results_that_alone_have_the_numbers_of_a_run_are_kept(study, tmp_path):
    path = tmp_path / "results.json"
    found = json.loads(json.dumps(gathered(study)))
    results.write(found, path)
    names = [run["name"] for run in found["runs"] if run["status"] == "finished"]
    fewer = found | {"runs": [run | {"status": "missing"} if run["name"] in names[:2] else run for run in found["runs"]]}
    trunks = {run["name"] for run in found["runs"] if run["status"] == "stopped"}

    def is_done(place, trunk):
        name = str(place.relative_to(tmp_path))
        assert trunk == (name in trunks)
        return name == names[0]  # its numbers are in its folder

    assert results.keep_lost(path, found, is_done) is None and path.exists()
    (tmp_path / names[1]).mkdir(parents=True)  # begun again
    note = results.keep_lost(path, fewer, is_done)
    kept = tmp_path / "results.kept1.json"
    shown = f"{kept} has their numbers, and ngpt study --report {kept} --out DIR shows them"
    assert note == f"1 runs of {path} are not there any more, the first is {names[1]}. {shown}"
    assert results.read(kept) == found and not path.exists()
    results.write(found, path)
    note = results.keep_lost(path, fewer | {"runs": []}, is_done)
    assert note.startswith(f"{len(names) + len(trunks) - 1} runs of ") and "results.kept2.json" in note
    path.write_text("{")
    assert results.keep_lost(path, fewer, is_done) is None


def test_a_branch_that_was_stopped_is_missing_and_a_trunk_is_not(study, tmp_path):
    plan, folder = study
    branch = "gpt_bf16/seed=1"
    (folder / branch / "summary.json").write_text(json.dumps(summary(status="stopped", steps=8)))
    found = gathered(study)
    assert f"{branch}: stopped" in found["missing"] and not any(line.startswith("gpt_trunk") for line in found["missing"])
    path = tmp_path / "results.json"
    results.write(found, path)
    note = results.keep_lost(path, found | {"runs": []}, lambda place, trunk: str(place.relative_to(tmp_path)) != branch)
    assert note is None  # it had not ended


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("summary.json", "{", "unreadable: summary.json: Expecting"),
        ("metrics.jsonl", "", "unreadable: metrics.jsonl: "),
        ("summary.json", None, "unfinished"),
    ],
)
def test_a_run_with_a_damaged_file_is_missing_and_the_page_is_made_of_the_others(study, tmp_path, file, content, reason):
    plan, folder = study
    name = "gpt_bf16/seed=1"
    before = {run["name"]: run for run in gathered(study)["runs"]}
    path = folder / name / file
    path.unlink() if content is None else path.write_text(content)
    found = gathered(study)
    (line,) = [line for line in found["missing"] if line.startswith(name)]
    assert line.startswith(f"{name}: {reason}") and str(folder) not in line
    assert all(run == before[run["name"]] for run in found["runs"] if run["name"] != name)
    assert [row["by_seed"].keys() for row in found["comparisons"]["gap"]["rows"]][-1] == ({"2"} if content is not None else {"1", "2"})
    results.write(found, tmp_path / "results.json")
    assert line in html.unescape(write_page(results.read(tmp_path / "results.json"), tmp_path).read_text())


def test_methods_are_named_once_and_those_of_rows_with_an_interval_alone(study, tmp_path):
    found = json.loads(json.dumps(gathered(study)))
    (gap,) = [one for one in comparison_tables(found) if "gap" in one["title"]]
    assert gap["methods"] == "t interval of the mean of paired differences"
    rows = found["comparisons"]["gap"]["rows"]
    none = {"low": None, "high": None, "shape": "all"}
    rows += [rows[-1] | {"interval": rows[-1]["interval"] | none | {"method": f"{gap['methods']}: one unit shows no scatter"}}]
    rows += [rows[-1] | {"by_seed": {}, "interval": rows[-1]["interval"] | none | {"method": "no run has it"}}]
    (shown,) = [one for one in comparison_tables(found) if "gap" in one["title"]]
    assert shown["methods"] == gap["methods"] and len(shown["rows"]) == len(rows)
    del rows[:-2]
    text = write_page(found, tmp_path).read_text()
    lead = text[text.index('<h3 class="table-title">gap') :]
    assert "Interval:" not in lead[: lead.index("Measured:")]


def test_the_method_of_a_difference_that_no_run_has_is_not_one(study):
    plan, folder = study
    shutil.rmtree(folder / "gpt_bf16")
    methods = {row["interval"]["method"] for row in gathered(study)["comparisons"]["gap"]["rows"]}
    assert methods == {"no run has it"}


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("", "Expecting"),
        ('{"results": {', "Expecting"),
        ("[1]", "no object with `results`"),
        ('{"results": []}', "no object with `results`"),
        ("\0", "Expecting"),
        (None, "Is a directory"),
    ],
)
def test_a_damaged_analysis_lacks_its_numbers_alone_and_the_page_says_what_heals_it(study, tmp_path, content, got):
    plan, folder = study
    damaged, before = plan.analyses[0], gathered(study)
    path = folder / damaged.file
    path.unlink()
    path.mkdir() if content is None else path.write_text(content)
    found = gathered(study)
    for run, old in zip(found["runs"], before["runs"], strict=True):
        if run["name"] == damaged.run:
            assert run["measures"] == {"loss": old["measures"]["loss"]} | dict.fromkeys(("gain", "rho", "rho_noise"))
            assert run["layers"] == dict.fromkeys(("gain", "rho", "rho_noise"), {}) and run["status"] == "finished"
        else:
            assert run == old
    (line,) = [line for line in found["missing"] if line.startswith(f"{damaged.file}: unreadable: ")]
    way_out = "The study makes it again, called without --report" if content is not None else "It is not made again: make it readable"
    assert got in line and line.endswith(f"Must be the JSON that `ngpt analyze` writes. {way_out}")
    assert has_result(path) == (content is None)  # what cannot be read may be a result
    assert len(found["missing"]) == len(before["missing"]) + 1 and str(folder) not in line
    results.write(found, tmp_path / "results.json")
    assert line in html.unescape(write_page(results.read(tmp_path / "results.json"), tmp_path).read_text())


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


@pytest.mark.parametrize(
    ("tokenizers", "told"),
    [
        (["bytes"], "A byte, or the end of a document"),
        (["bpe"], "A piece of text of the vocabulary of tokenizer.kind=bpe"),
        ([None], "What the tokenizer of its text makes: with tokenizer=bytes a byte. These results do not say which it is"),
        (["bpe", "bytes", "bpe"], "A piece of text of the vocabulary of tokenizer.kind=bpe; A byte, or the end of a document"),
    ],
)
def test_the_page_says_what_a_token_is(study, tmp_path, tokenizers, told):
    plan, folder = study
    for run, tokenizer in zip(plan.runs, itertools.cycle(tokenizers)):
        if tokenizer and (folder / run.name).exists():
            with (folder / run.name / "config.yaml").open("a") as config:
                config.write(f"tokenizer: {{kind: {tokenizer}}}\n")
    found = gathered(study)
    results.write(found, tmp_path / "results.json")
    assert dict(design_rows(found))["A token"] == told
    assert html.unescape(write_page(results.read(tmp_path / "results.json"), tmp_path).read_text()).count(told) == 1


def test_results_that_do_not_say_the_tokenizer_give_the_same_page_but_for_that(study, tmp_path):
    """As those of before it was kept."""
    found = gathered(study)
    old = json.loads(json.dumps(found))
    for run in old["runs"]:
        del run["tokenizer"]
    assert write_page(old, tmp_path / "old").read_text() == write_page(found, tmp_path / "new").read_text()


def test_the_averaging_model_is_the_mean_of_the_layers_gains():
    """Correlations that differ between layers: the mean of logarithms is less than the logarithm of means."""
    layers = {"signal": {"0": 0.0, "1": 0.03}, "noise": {"0": 0.0, "1": 0.0}}
    run = {"arm": "wide", "point": {"model.hidden_size": 1001}, "measures": {}, "layers": layers}
    figure = {"over": "model.hidden_size", "rho": ["signal", "noise"]}
    (model,) = averaging_model({"runs": [run]}, figure)
    arm, x, y = model
    assert (arm, x[0], x[-1]) == ("wide", 1001, 16384)
    assert y[0] == pytest.approx(10 * math.log10(31) / 2) and y[-1] == pytest.approx(10 * math.log10(1 + 16383 * 0.03) / 2)


@pytest.mark.parametrize("name", sorted(studies()))
def test_every_shipped_study_has_its_tables_before_its_first_run(name, tmp_path):
    """With every way to take a measure in words."""
    study = plan(name, load_study(name), None)
    found = results.gather(study, tmp_path, "", "ngpt study", {"git": None, "versions": {}, "gpus": []})
    assert {table["title"] for table in comparison_tables(found) if table["judged"]}
    assert _TAKEN.keys() == {one.name: one for one in dataclasses.fields(Measure)}["take"].metadata["choices"].keys()
