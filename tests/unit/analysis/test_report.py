import base64
import csv
import io
import math
import re
from html.parser import HTMLParser

import pytest

from launch import cli
from ngpt.analysis import download, drawing, plots
from ngpt.analysis.report import write_report
from ngpt.config.errors import ConfigError
from tests.unit.analysis.runs import SCALES, record, summary, write_run

PARTS = ("mean", "min", "max")


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def without_plots(monkeypatch):
    """For tests of the words: drawing takes most of the time."""
    monkeypatch.setattr(plots, "write_plots", lambda groups, folder: [])


def decoded(address):
    kind, _, content = address.partition(";base64,")
    assert kind == "data:text/csv"
    return list(csv.reader(io.StringIO(base64.b64decode(content).decode())))


def test_the_page_is_self_contained_and_has_the_figures_of_the_pngs_beside_it(tmp_path):
    shown = ("step", "tokens", "train_loss", "worst_norm_deviation", *(f"health/{scale}/{part}" for scale in SCALES[:2] for part in PARTS))
    path = write_report([write_run(tmp_path / "a", [{key: record(step)[key] for key in shown} for step in (10, 20)])])
    assert path == tmp_path / "a" / "report" / "index.html"
    page, text = Page(path), path.read_text()
    names = {"loss_tokens", "norm_deviation", "scales"}
    assert {png.stem for png in path.parent.glob("*.png")} == names
    assert all(png.read_bytes().startswith(b"\x89PNG") for png in path.parent.glob("*.png"))
    assert len(page.all("svg")) == len(names) + 1  # the two scales are a panel each
    assert not page.all("script") and not page.all("link") and not page.all("img")
    assert all(attributes["href"].startswith(("#", "data:")) for attributes in page.all("a"))
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert f"--series-1: {drawing.LIGHT['--series-1']}" in text.partition("prefers-color-scheme: dark")[0]
    assert f"--series-1: {drawing.DARK['--series-1']}" in text.partition("prefers-color-scheme: dark")[2]


def test_the_contents_list_names_the_sections_that_are_there(tmp_path):
    page = Page(write_report([write_run(tmp_path / "a", [{"step": 1, "tokens": 5, "train_loss": 2.0}])]))
    listed = [attributes["href"][1:] for attributes in page.all("a") if attributes["href"].startswith("#")]
    assert listed == ["result", "loss", "not-measured", "config", "environment", "data"]
    assert listed == [attributes["id"] for attributes in page.all("h2")]


def test_four_figures_lead_the_page(tmp_path, without_plots):
    page = Page(write_report([write_run(tmp_path / "a", summary=summary())]))
    assert len([attributes for attributes in page.all("dd") if "value" in attributes["class"]]) == 4
    assert page.text.index("1.1303") < page.text.index("Architecture")


def test_config_and_environment_are_folded(tmp_path, without_plots):
    text = write_report([write_run(tmp_path / "a")]).read_text()
    for shown in ("hidden_size: 64", "0123abcd"):
        assert text.rindex("<details>", 0, text.index(shown)) > text.rfind("</details>", 0, text.index(shown))


def test_the_data_can_be_taken_from_the_page(tmp_path, without_plots):
    lines = [record(10), record(20, train_loss=math.nan, grad_norm=None) | {"precision/layers.0.x/fprop/dot_snr_db": 1.5}]
    path = write_report([write_run(tmp_path / "a", lines), write_run(tmp_path / "b", [record(10)])])
    links = {attributes["download"]: attributes["href"] for attributes in Page(path).all("a") if "download" in attributes}
    head, *rows = decoded(links["metrics.csv"])
    found = [dict(zip(head, row, strict=True)) for row in rows]
    assert [(row["run"], row["step"], row["tokens"]) for row in found] == [("a", "10", "20480"), ("a", "20", "40960"), ("b", "10", "20480")]
    assert float(found[0]["train_loss"]) == record(10)["train_loss"]
    assert (found[1]["train_loss"], found[1]["grad_norm"]) == ("nan", "")
    assert decoded(links["precision.csv"]) == [
        ["run", "step", "tokens", "precision/layers.0.x/fprop/dot_snr_db"],
        ["a", "20", "40960", "1.5"],
    ]
    for name, address in links.items():
        assert base64.b64decode(address.partition(",")[2]) == (path.parent / name).read_bytes()


def test_data_that_browsers_would_cut_lies_beside_the_page(tmp_path, without_plots, monkeypatch):
    monkeypatch.setattr(download, "_INSIDE", 100)
    path = write_report([write_run(tmp_path / "a")])
    (link,) = (attributes for attributes in Page(path).all("a") if "download" in attributes)
    assert link["href"] == "metrics.csv" and (path.parent / "metrics.csv").is_file() and "lies beside it" in Page(path).text


def test_tables_of_an_earlier_report_do_not_stay(tmp_path, without_plots):
    with_layers = write_run(tmp_path / "a", [record(10) | {"precision/layers.0.x/fprop/dot_snr_db": 1.5}])
    write_report([with_layers], tmp_path / "out")
    write_report([write_run(tmp_path / "b")], tmp_path / "out")
    assert not (tmp_path / "out" / "precision.csv").exists()


def test_seeds_are_grouped_and_each_run_is_on_demand(tmp_path, without_plots):
    seeds = {seed: {"train": {"seed": seed}} for seed in (1, 2)}
    folders = [write_run(tmp_path / f"base_seed{seed}", None, config, summary(val_loss=1.0 + seed)) for seed, config in seeds.items()]
    page = Page(write_report([*folders, write_run(tmp_path / "other", summary=summary(), config={"optim": {"lr": 0.5}})]))
    assert "base (2 seeds), other" in page.text and "2.0000 to 3.0000" in page.text and "Each run" in page.text
    assert "1, 2" in page.text  # the seeds, among the differences
    assert len([attributes for attributes in page.all("td") if attributes.get("class") == "best"]) >= 1


def test_on_a_narrow_screen_each_cell_says_its_column_and_equal_cells_are_shown_once(tmp_path, without_plots):
    folders = [
        write_run(tmp_path / name, summary=summary(val_loss=loss), config={"optim": {"lr": loss / 100}})
        for name, loss in (("a", 1.0), ("b", 2.0))
    ]
    page = write_report(folders).read_text()
    tables = re.findall(r'<table class="[^"]*stack">.*?</table>', page, re.DOTALL)
    assert len(tables) == page.count("<table") == 3  # what differs, what came of it, environment
    same = {}
    for table in tables:
        assert [re.sub("<wbr>", "", head) for head in re.findall('<th scope="col">(.*?)</th>', table)] == ["a", "b"]
        for row in table.split("<tbody>")[1].split("</tr>")[:-1]:
            assert re.findall('data-head="(.*?)"', row) == ["a", "b"]
            same[re.search('<th scope="row">(.*?)</th>', row)[1]] = 'class="same"' in row
    assert same["Status"] and not same["Validation loss (nats per token)"] and not same["optim.lr"]
    assert 'class="stack"' not in write_report(folders[:1]).read_text()  # one run has label and value as it is


def test_the_page_shows_result_config_environment_and_sample(tmp_path, without_plots):
    folder = write_run(tmp_path / "a", summary=summary())
    (folder / "sample.txt").write_bytes("Once upon a tíme".encode() + b"\xff")
    text = Page(write_report([folder])).text
    result = ("Finished at step 100", "1.6307", "3.7121", "4.8732")
    for shown in (*result, "hidden_size: 64", "0123abcd", "git.dirty", "2.11.0", "Once upon a tíme\N{REPLACEMENT CHARACTER}"):
        assert shown in text
    assert "What differs" not in text


def test_values_are_escaped(tmp_path, without_plots):
    attack = "<script>alert('x')</script>"
    folder = write_run(tmp_path / "a", config={"run": {"name": attack}}, summary=summary(status="failed", error=attack))
    (folder / "sample.txt").write_text(attack)
    page = Page(write_report([folder]))
    assert not page.all("script")
    assert page.text.count(attack) >= 4  # title, banner, config, sample


def test_several_runs_are_compared(tmp_path, without_plots):
    folders = [write_run(tmp_path / "a", summary=summary()), write_run(tmp_path / "b", [record(10)], config={"optim": {"lr": 0.5}})]
    path = write_report(folders)
    assert path == tmp_path / "report_a_b" / "index.html"
    page = Page(path)
    assert "What differs" in page.text and "optim.lr" in page.text
    assert [attributes["class"] for attributes in page.all("p") if "banner" in attributes.get("class", "")] == ["banner unfinished"]


def test_a_run_with_only_config_and_metrics_is_reported(tmp_path, without_plots):
    folder = write_run(tmp_path / "a")
    (folder / "environment.json").unlink()
    text = Page(write_report([folder])).text
    assert "No summary yet" in text and "No environment.json" in text


def test_a_second_report_replaces_the_first(tmp_path, without_plots):
    folder = write_run(tmp_path / "a")
    write_report([folder])
    (folder / "summary.json").write_text('{"steps": 100, "status": "finished"}')
    assert "Finished at step 100" in Page(write_report([folder])).text


def test_names_too_long_for_a_folder_are_cut(tmp_path, without_plots):
    folders = [write_run(tmp_path / (letter * 200)) for letter in "abc"]
    pages = [write_report(folders), write_report(folders[:2]), write_report([folders[0], folders[2]])]
    assert len(set(pages)) == 3  # sets of runs do not replace each other's
    assert re.fullmatch(r"report_a{50}_and_2_more_[0-9a-f]{6}", pages[0].parent.name)


def test_an_unusable_folder_is_refused(tmp_path, without_plots):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="needs a folder it can write.*--out"):
        write_report([write_run(tmp_path / "a")], tmp_path / "file")


def test_the_command_prints_the_page_and_reports_errors_without_a_traceback(tmp_path, capsys, without_plots):
    folder = write_run(tmp_path / "a")
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"Report: {tmp_path / 'out' / 'index.html'}\n"
    assert cli.main(["report", str(tmp_path / "missing")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"{tmp_path / 'missing'}: no such folder")
