"""From results to a page."""

import dataclasses
import html
import itertools
import json
import math
import re
import shutil

import pytest

from launch import cli
from ngpt.analysis.intervals import Interval
from ngpt.config.study import Measure, load_study, studies
from ngpt.study import results
from ngpt.study.cells import _TAKEN, comparison_tables, number, unbounded_notes
from ngpt.study.design import design_rows, provenance_rows
from ngpt.study.judgement import verdict_reason, verdict_tables
from ngpt.study.page import write_page
from ngpt.study.plan import plan
from tests.unit.analysis.runs import record, summary, write_run
from tests.unit.study.studies import SHOWN, gathered, planned


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


@pytest.mark.parametrize("name", sorted(studies()))
def test_every_shipped_study_has_its_tables_before_its_first_run(name, tmp_path):
    """With every way to take a measure in words."""
    study = plan(name, load_study(name), None)
    found = results.gather(study, tmp_path, "", "ngpt study", {"git": None, "versions": {}, "gpus": []})
    assert {table["title"] for table in comparison_tables(found) if table["judged"]}
    assert _TAKEN.keys() == {one.name: one for one in dataclasses.fields(Measure)}["take"].metadata["choices"].keys()
