"""Texts by URL: fsspec's memory:// and file systems made of it that break, against the same texts in local files."""

import gzip
import io
import json
import re
import time
import tracemalloc
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import parquet

from launch import cli
from ngpt.config.errors import ConfigError
from ngpt.config.schema import TokenizerConfig
from ngpt.data import remote
from ngpt.data.files import READ_BYTES
from ngpt.data.manifest import Manifest
from ngpt.data.plan import Options
from ngpt.data.prepare import prepare
from ngpt.data.sources import find_sources
from tests.unit.data.shards import assert_marks_were_taken_up, mark_finished

BYTES = TokenizerConfig(name="bytes", kind="bytes")
TEXTS = [f"Document {i}: größe {'xy ' * (i * 37 % 101)}end" for i in range(100)]
PLAIN = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


class Store(MemoryFileSystem):
    """A store with checksums of contents, as S3 has them; `limit` bytes of a file are read, then `error` comes."""

    protocol = "store"
    limit, error = None, OSError("connection reset\nby peer")

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(re.sub(r"^\w+://", "memory://", path).partition("?")[0])

    def info(self, path, **kwargs):
        info = super().info(path, **kwargs)
        return info if info["type"] == "directory" else info | {"md5Hash": f'"{hash(self.store[info["name"]].getvalue())}"'}

    def find(self, path, **kwargs):
        return {name: self.info(name) for name in super().find(path)}

    def _open(self, path, mode="rb", **kwargs):
        file = super()._open(path, mode, **kwargs)
        return Breaking(file.getvalue(), type(self)) if mode == "rb" else file


class Breaking(io.BytesIO):
    reads = []

    def __init__(self, content, store):
        super().__init__(content)
        self.store = store

    def read(self, size=-1):
        self.reads.append(size)
        if self.store.limit is not None and self.tell() >= self.store.limit:
            raise self.store.error
        return super().read(size if self.store.limit is None else min(size, self.store.limit - self.tell()))


@pytest.fixture(autouse=True)
def store(monkeypatch):
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    fsspec.register_implementation("store", Store, clobber=True)
    Breaking.reads.clear()
    yield monkeypatch
    MemoryFileSystem.store.clear()


def put(name, content):
    MemoryFileSystem().pipe(f"/{name}", content)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


def run(inputs, out, **keywords):
    options = Options(**{"split": "1,0,0", "documents": "blank-line", **keywords.pop("options", {})})
    return prepare(inputs if isinstance(inputs, list) else [inputs], out, BYTES, options, **{"workers": 1, **keywords})


def in_parquet():
    written = io.BytesIO()
    parquet.write_table(pa.table({"text": TEXTS, "other": [1] * len(TEXTS)}), written, row_group_size=30)
    return written.getvalue()


FORMS = {
    "a.jsonl": PLAIN,
    "a.jsonl.gz": gzip.compress(PLAIN[:999]) + gzip.compress(PLAIN[999:]),
    "a.JSONL.zst": zstandard.compress(PLAIN[:999]) + zstandard.compress(PLAIN[999:]),
    "a.txt": "\n \n\n".join(TEXTS).encode(),
    "a.txt.zst": zstandard.compress("\n \n\n".join(TEXTS).encode()),
    "a.parquet": in_parquet(),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("protocol", ["memory", "store"])
def test_every_format_gives_the_tokens_of_the_local_file(name, protocol, tmp_path):
    (tmp_path / name).write_bytes(FORMS[name])
    put(f"bucket/{name}", FORMS[name])
    local = run(tmp_path / name, tmp_path / "local")
    workers = 2 if name in ("a.jsonl", "a.parquet") else 1  # whose start takes most of a second; all of it is read here
    manifest = run(f"{protocol}://bucket/{name}", tmp_path / "out", workers=workers, chunk_bytes=1000)
    assert files(tmp_path / "out") == files(tmp_path / "local")
    (source,) = manifest.sources
    assert (source.path, source.bytes, source.documents) == (f"{protocol}://bucket/{name}", len(FORMS[name]), len(TEXTS))
    if protocol == "store":
        assert source.checksum.startswith('md5Hash "') and not source.sha256
    else:
        assert source.sha256 == local.sources[0].sha256 and not source.checksum
    assert manifest == Manifest.load(tmp_path / "out")


def test_a_folder_by_url_is_read_as_a_local_one(tmp_path):
    names = [
        "b.jsonl",
        "B.JSONL",
        "a-b/x.jsonl",
        "a/y.txt",
        "a/z.jsonl.gz",
        "c.json",
        ".hidden/d.jsonl",
        ".hidden/e.jsonl",
        "a/._f.txt",
        "g",
    ]
    for name in names:
        content = f'{{"text": "{name}"}}\n'.encode()
        content = gzip.compress(content) if name.endswith("gz") else content
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
        put(f"bucket/in/{name}", content)
    local, local_left = find_sources([tmp_path / "in"])
    for given in ("memory://bucket/in", "memory://bucket/in/", "store://bucket/in"):
        sources, left = find_sources([given])
        top = given.rstrip("/") + "/"
        assert [source.name.removeprefix(top) for source in sources] == [source.name for source in local]
        assert left == local_left and all(source.name.startswith(top) for source in sources)
    assert find_sources([f"file://{tmp_path}/in"]) == (local, local_left)
    assert find_sources([f"file://{tmp_path}/in/b.jsonl"])[0] == find_sources([tmp_path / "in/b.jsonl"])[0]
    run(tmp_path / "in", tmp_path / "local")
    manifest = run("memory://bucket/in", tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "local")
    assert "left out of the sources: .hidden (hidden)" in manifest.notes[0]


@pytest.mark.parametrize("protocol", ["memory", "store"])
def test_same_again_writes_nothing_and_a_changed_file_is_refused(protocol, tmp_path):
    put("bucket/a.jsonl", PLAIN)
    first = run(f"{protocol}://bucket/a.jsonl", tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    Breaking.reads.clear()
    put("bucket/a.jsonl", PLAIN)  # the same content, written again
    assert run(f"{protocol}://bucket/a.jsonl", tmp_path / "out") == first
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times} == times
    assert not Breaking.reads  # of the store: its checksums say that nothing changed
    put("bucket/a.jsonl", PLAIN.replace(b"Document 7", b"Document 8"))
    changed = "sources.0.checksum" if protocol == "store" else "sources.0.sha256"
    with pytest.raises(ConfigError, match=f"holds data prepared otherwise: {changed}: "):
        run(f"{protocol}://bucket/a.jsonl", tmp_path / "out")


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("error", [Store.error, ValueError("session is closed"), TimeoutError()])
def test_a_read_that_breaks_is_one_line_and_the_same_command_continues(name, error, store, tmp_path):
    put(f"bucket/{name}", FORMS[name])
    url = f"store://bucket/{name}"
    run(url, tmp_path / "whole")
    store.setattr(Store, "limit", len(FORMS[name]) // 2)
    store.setattr(Store, "error", error)
    with pytest.raises(ConfigError) as raised:
        run(url, tmp_path / "out", chunk_bytes=200)
    text = str(raised.value)
    assert text.startswith(f"{url}: unreadable: {type(error).__name__}") and "\n" not in text and "finished work is kept" in text
    store.setattr(Store, "limit", None)
    run(url, tmp_path / "out", chunk_bytes=200)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_finished_shards_are_not_made_again(store, tmp_path):
    put("bucket/a.jsonl", PLAIN)
    run("store://bucket/a.jsonl", tmp_path / "whole")
    store.setattr(Store, "limit", len(PLAIN) // 2)
    store.setattr(Store, "error", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run("store://bucket/a.jsonl", tmp_path / "out", chunk_bytes=1000)
    store.setattr(Store, "limit", None)
    put("bucket/a.jsonl", PLAIN + b'{"text": "more"}\n')
    with pytest.raises(ConfigError, match=r"unfinished preparation: sources.0.bytes: .*sources.0.checksum"):
        run("store://bucket/a.jsonl", tmp_path / "out", chunk_bytes=1000)
    marks = mark_finished(tmp_path / "out")
    put("bucket/a.jsonl", PLAIN)
    run("store://bucket/a.jsonl", tmp_path / "out", chunk_bytes=1000)
    assert_marks_were_taken_up(tmp_path / "out", tmp_path / "whole", marks)


def test_a_file_that_ends_early_is_no_shorter_text(store, tmp_path):
    put("bucket/a.jsonl", PLAIN)
    store.setattr(Breaking, "read", lambda self, size=-1: io.BytesIO.read(self, min(size, max(0, 3000 - self.tell()))))
    with pytest.raises(ConfigError, match=f"unreadable: it ended after 3,000 of {len(PLAIN):,} bytes"):
        run("store://bucket/a.jsonl", tmp_path / "out")


def test_a_large_file_is_not_held_in_memory(store, tmp_path):
    put("bucket/a.jsonl", PLAIN * 400)
    (source,), _ = find_sources(["store://bucket/a.jsonl"])
    stream = source.open()
    tracemalloc.start()
    assert sum(1 for _ in stream) == 400 * len(TEXTS)
    assert tracemalloc.get_traced_memory()[1] < 4 * READ_BYTES < len(PLAIN * 400)
    tracemalloc.stop()
    assert max(Breaking.reads) <= READ_BYTES and min(Breaking.reads) > 0


def test_a_stream_that_cannot_seek_is_read(store, tmp_path):
    put("bucket/a.jsonl.gz", FORMS["a.jsonl.gz"])
    put("bucket/a.parquet", FORMS["a.parquet"])

    def refuse(*arguments):
        raise ValueError("Cannot seek streaming file")

    store.setattr(Breaking, "seek", refuse, raising=False)
    store.setattr(Breaking, "seekable", lambda self: False, raising=False)
    assert run("store://bucket/a.jsonl.gz", tmp_path / "out").sources[0].documents == len(TEXTS)
    with pytest.raises(ConfigError, match=r"a.parquet: unreadable: .*seek"):
        run("store://bucket/a.parquet", tmp_path / "other")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/absent.jsonl", "memory://bucket/absent.jsonl: no such file or folder"),
        ("memory://nowhere", "no such file or folder"),
        ("memory://bucket/a.csv", "unknown extension. Known ones: .txt"),
        ("memory://bucket/others", "no text file in this folder, only a.csv (unknown extension)"),
        ("https://host/folder?sig=SECRET", "https://host/folder: unknown extension"),
        ("nothing://bucket/a.txt", "nothing://bucket/a.txt: Protocol not known: nothing. A URL begins with the protocol"),
        ("s3://user:SECRET@bucket/a.txt", "s3://***@bucket/a.txt: a password. A URL is kept in the manifest"),
        ("s3://KEY:SECRET/of@bucket/a.txt", "s3://***@bucket/a.txt: a password"),
        ("https://user:SECRET@host/a.txt?x=SECRET", "https://***@host/a.txt: a password"),
        ("https://SECRET@host/a.txt", "https://***@host/a.txt: a password"),
        ("zip://a.txt::s3://bucket/a.zip", "a chain of file systems"),
    ],
)
def test_unusable_urls_are_refused(url, message, tmp_path):
    put("bucket/a.csv", b"x")
    put("bucket/others/a.csv", b"x")
    with pytest.raises(ConfigError) as error:
        find_sources([url])
    assert message in str(error.value) and "SECRET" not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="named twice"):
        put("bucket/a.txt", b"x")
        find_sources(["memory://bucket/a.txt", "memory://bucket/a.txt"])


@pytest.mark.parametrize(
    "url", ["hf://datasets/org/name@v1/a.txt", "abfs://container@account.host/a.txt", "https://host:8080/a@b.txt", "s3://bucket/a:b@c.txt"]
)
def test_an_at_sign_alone_is_no_password(url):
    remote.check_url(url)


@pytest.mark.parametrize(("url", "extra"), [("s3://b/a.txt", "s3"), ("gs://b/a.txt", "gs"), ("https://b/a.txt?sig=SECRET", "http")])
def test_an_absent_package_names_the_extra(url, extra, store):
    def absent(url, **keywords):
        raise ImportError(f"Install it to access {extra}")

    store.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(ConfigError) as error:
        find_sources([url])
    assert f"pip install 'ngpt-megatron[{extra}]'" in str(error.value) and "SECRET" not in str(error.value)


def test_a_web_server_that_cannot_be_reached_is_not_an_absent_file(store):
    def unreachable(self, path, **keywords):
        raise FileNotFoundError(path) from ConnectionError("Cannot connect to host")

    store.setattr(Store, "info", unreachable)
    store.setattr("fsspec.core.url_to_fs", lambda url: (Store(), url))
    with pytest.raises(ConfigError, match="https://host/a.txt: unreadable: ConnectionError: Cannot connect to host"):
        find_sources(["https://host/a.txt"])
    with pytest.raises(ConfigError, match="no such file or folder"):
        find_sources(["store://host/a.txt"])


@pytest.mark.parametrize("error", [PermissionError("Forbidden\nfor you"), RuntimeError("no credentials"), TimeoutError()])
def test_a_store_that_refuses_to_list_is_one_line(error, store):
    def refuse(self, path, **keywords):
        raise error

    store.setattr(Store, "info", refuse)
    with pytest.raises(ConfigError) as raised:
        find_sources(["store://bucket/in"])
    assert str(raised.value).startswith(f"store://bucket/in: unreadable: {type(error).__name__}") and "\n" not in str(raised.value)
    assert "credentials" in str(raised.value)


@pytest.fixture
def web(store, tmp_path):
    """The store in place of the web."""

    class Web(Store):
        protocol = "https"

    store.setattr("fsspec.core.url_to_fs", lambda url: (Web(), Web._strip_protocol(url)))
    store.chdir(tmp_path)
    return Web


def test_a_signature_is_neither_kept_nor_shown(web, store, tmp_path):
    put("host/a.jsonl", PLAIN)
    run("https://host/a.jsonl?sig=SECRET1", tmp_path / "out")
    run("https://host/a.jsonl?sig=SECRET2", tmp_path / "out")  # another signature of the same file
    assert Manifest.load(tmp_path / "out").sources[0].path == "https://host/a.jsonl"
    assert "SECRET" not in (tmp_path / "out/manifest.json").read_text()
    store.setattr(web, "limit", 100)
    store.setattr(web, "error", OSError("cannot read https://host/a.jsonl?sig=SECRET"))
    with pytest.raises(ConfigError, match="cannot read https://host/a.jsonl") as raised:
        run("https://host/a.jsonl?sig=SECRET", tmp_path / "other")
    assert "SECRET" not in str(raised.value)


@pytest.mark.parametrize(
    ("protocol", "info", "checksum"),
    [
        ("s3", {"ETag": '"a"', "created": time.time()}, 'ETag "a"'),
        ("https", {"ETag": '"a"'}, ""),  # of a server, or of contents that are alike
        ("gs", {"etag": "x", "md5Hash": "y"}, "md5Hash y"),  # another etag for other metadata
        ("gs", {"etag": "x"}, ""),
        ("hf", {"blob_id": "z"}, "blob_id z"),
        ("memory", {"LastModified": 1, "created": 2}, ""),
    ],
)
def test_checksums_that_file_systems_give(protocol, info, checksum):
    assert remote.checksum_of(f"{protocol}://a/b", info) == checksum


@pytest.mark.parametrize(
    "message",
    [
        "403, url='https://b.s3.amazonaws.com/a.txt?X-Amz-Credential=AKIA/2024/us&X-Amz-Signature=SECRET'",  # quoted anew
        "404 for https://cdn.host/x/a.txt?Signature=SECRET&Key=1",  # redirected
        "404\n\nNot found:\nhttps://host/a.txt?sig=SECRET",
    ],
)
@pytest.mark.parametrize("when", ["asked", "opened", "read"])
def test_no_signature_of_any_url_is_shown_and_a_message_is_one_line(message, when, web, store):
    put("host/a.txt", PLAIN)

    def fails(*_, **__):
        raise RuntimeError(message)

    owner, name = {"asked": (web, "info"), "opened": (web, "_open"), "read": (Breaking, "read")}[when]
    store.setattr(owner, name, fails)
    with pytest.raises((ConfigError, OSError)) as raised:
        run("https://host/a.txt?X-Amz-Credential=AKIA%2F2024", Path("out"))
    shown = str(raised.value)
    assert "SECRET" not in shown and "AKIA%" not in shown and "\n" not in shown and "a.txt" in shown


def test_a_file_system_that_cannot_be_used_is_one_line():
    with pytest.raises(ConfigError, match="cannot be used"):
        remote.listing("github://a/x.txt")
    with pytest.raises(ConfigError, match="a protocol|begins with the protocol"):
        remote.listing("nowhere://a/x.txt")
    remote.check_url("github://org:repo@sha/x.txt")


def test_the_command_takes_urls(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    put("bucket/texts/a.jsonl", PLAIN)
    for url in ("memory://bucket/texts", "memory://bucket/texts/a.jsonl"):
        assert cli.main(["data", "prepare", url, "--workers", "1"]) == 0
        assert "source memory://bucket/texts/a.jsonl: " in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"texts_bytes", "a_bytes"}
    assert cli.main(["data", "prepare", "memory://bucket/absent"]) == 2
    assert capsys.readouterr().err.startswith("memory://bucket/absent: no such file or folder")
