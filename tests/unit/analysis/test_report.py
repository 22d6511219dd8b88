import base64
from html.parser import HTMLParser

import pytest

from launch import cli
from ngpt.analysis import plots
from ngpt.analysis.report import write_report
from ngpt.config.errors import ConfigError
from tests.unit.analysis.runs import record, summary, write_run


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
    monkeypatch.setattr(plots, "write_plots", lambda runs, folder: [])


def test_the_page_is_self_contained_and_its_images_are_the_pngs_beside_it(tmp_path):
    path = write_report([write_run(tmp_path / "a", summary=summary())])
    assert path == tmp_path / "a" / "report" / "index.html"
    page = Page(path)
    sources = [image["src"] for image in page.all("img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    images = {base64.b64decode(source.partition(",")[2]) for source in sources}
    assert images == {png.read_bytes() for png in path.parent.glob("*.png")}
    assert len(images) == len(sources) == 8 and all(image.startswith(b"\x89PNG") for image in images)
    assert not page.all("script") and not page.all("link")
    assert not [attributes for _, attributes in page.tags if "href" in attributes]
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    assert "prefers-color-scheme: dark" in path.read_text()


def test_the_page_shows_result_config_environment_and_sample(tmp_path, without_plots):
    folder = write_run(tmp_path / "a", summary=summary())
    (folder / "sample.txt").write_bytes("Once upon a tíme".encode() + b"\xff")
    text = Page(write_report([folder])).text
    result = ("Finished at step 100", "1.6307", "3.7121", "4.8732")
    for shown in (*result, "hidden_size: 64", "0123abcd", "git.dirty", "2.11.0", "Once upon a tíme\N{REPLACEMENT CHARACTER}"):
        assert shown in text
    assert "Config differences" not in text


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
    assert "Config differences" in page.text and "optim.lr" in page.text
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
    assert write_report([write_run(tmp_path / (letter * 150)) for letter in "ab"]).is_file()


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
