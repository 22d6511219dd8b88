"""What preparation writes, against a plain reading of the same files."""

import gzip
import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet
from tokenizers import Tokenizer as Backend
from tokenizers import models

from ngpt.config.errors import ConfigError
from ngpt.config.schema import TokenizerConfig
from ngpt.data.assemble import split_documents
from ngpt.data.encode import Shard, load_header, load_shard, save_shard
from ngpt.data.indexed import IndexedReader
from ngpt.data.inspect import data_lines
from ngpt.data.manifest import NAME, Manifest
from ngpt.data.plan import Options
from ngpt.data.prepare import prepare
from ngpt.data.sources import find_sources
from ngpt.data.tokenizers import EOD, from_manifest

BYTES = TokenizerConfig(name="bytes", kind="bytes")
TEXTS = [f"Document {i}: größe {'xy ' * (i * 37 % 101)}end" for i in range(200)]


def write_jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return path


def documents(out, split="train"):
    return [document.tolist() for document in IndexedReader(out / split)]


def encoded(texts):
    return [[*text.encode(), 256] for text in texts]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".checked")}


def run(inputs, out, **keywords):
    options = Options(**{key: keywords.pop(key) for key in list(keywords) if key in Options.__annotations__})
    return prepare(inputs if isinstance(inputs, list) else [inputs], out, keywords.pop("tokenizer", BYTES), options, workers=1, **keywords)


def test_splits_are_contiguous_and_by_bytes(tmp_path):
    manifest = run(write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out", split="70,20,10")
    expected, start, total = {"train": [], "valid": [], "test": []}, 0, sum(len(text.encode()) for text in TEXTS)
    for text in TEXTS:
        expected["train" if 10 * start < 7 * total else "valid" if 10 * start < 9 * total else "test"].append(text)
        start += len(text.encode())
    for name, texts in expected.items():
        assert documents(tmp_path / "out", name) == encoded(texts)
        split = manifest.splits[name]
        assert (split.documents, split.bytes_of_text) == (len(texts), sum(len(text.encode()) for text in texts))
        assert split.tokens == split.bytes_of_text + split.documents
    assert manifest == Manifest.load(tmp_path / "out")
    assert not (tmp_path / "out/.prepare").exists()


def test_a_document_that_starts_at_a_border_is_the_next_splits():
    members = split_documents([np.ones(4, np.int64), np.zeros(0, np.int64), np.ones(6, np.int64)], "70,20,10")
    assert [member.tolist() for member in members] == [[0] * 4, [], [0, 0, 0, 1, 1, 2]]


@pytest.mark.parametrize(
    ("sizes", "split", "expected"),
    [
        ([[5], [5, 5, 5, 5], [], [5]], "90,5,5", [[0], [0, 0, 0, 1], [], [2]]),
        ([[1, 1, 1, 97]], "90,5,5", [[0, 0, 1, 2]]),  # the last one has nearly all bytes
        ([[97, 1, 1, 1]], "10,45,45", [[0, 1, 2, 2]]),  # the first one has
        ([[5, 5]], "90,0,10", [[0, 2]]),
        ([[5, 5]], "99,1,0", [[0, 1]]),
        ([[5, 5]], "100,0,0", [[0, 0]]),
        ([[5, 5]], "90,5,5", [[0, 0]]),  # too few: that is refused
    ],
)
def test_each_split_with_a_share_has_a_document_if_there_are_enough(sizes, split, expected):
    members = split_documents([np.array(shard, np.int64) for shard in sizes], split)
    assert [member.tolist() for member in members] == expected


def test_a_folder_of_a_few_files_is_split(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(6):
        (tmp_path / f"texts/{number}.txt").write_text("A small text. " * (number + 1))
    found = run(tmp_path / "texts", tmp_path / "out").splits
    assert {name: split.documents for name, split in found.items()} == {"train": 4, "valid": 1, "test": 1}


def test_a_split_without_a_share_is_not_written(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    assert list(run(source, tmp_path / "out", split="0.9,0,0.1").splits) == ["train", "test"]
    assert list(run(source, tmp_path / "all", split="1,0,0").splits) == ["train"]
    assert documents(tmp_path / "all") == encoded(TEXTS)


def test_workers_and_chunks_do_not_change_a_byte(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    run(source, tmp_path / "one")
    reference = files(tmp_path / "one")
    for number, chunk_bytes in enumerate((1000, 7000)):
        prepare([source], tmp_path / f"two{number}", BYTES, workers=2, chunk_bytes=chunk_bytes)
        assert files(tmp_path / f"two{number}") == reference


@pytest.mark.parametrize("form", ["jsonl.gz", "jsonl.zst", "ndjson", "parquet", "binary.parquet", "txt", "txt.zst", "bom.jsonl"])
def test_every_format_gives_the_same_documents(form, tmp_path):
    path = tmp_path / f"a.{form}"
    plain = write_jsonl(tmp_path / "plain").read_bytes()
    blank_lines = "\n \n\n".join(TEXTS).encode()
    if form == "jsonl.gz":  # two members, as `cat a.gz b.gz` makes
        path.write_bytes(gzip.compress(plain[:999]) + gzip.compress(plain[999:]))
    elif form == "jsonl.zst":
        path.write_bytes(zstandard.compress(plain[:999]) + zstandard.compress(plain[999:]))
    elif form.endswith("parquet"):
        values = [text.encode() for text in TEXTS] if form.startswith("binary") else TEXTS
        parquet.write_table(pa.table({"text": values, "other": [1] * len(TEXTS)}), path, row_group_size=30)
    elif form.startswith("txt"):
        path.write_bytes(zstandard.compress(blank_lines) if form.endswith("zst") else blank_lines)
    else:
        path.write_bytes((b"\xef\xbb\xbf" if form.startswith("bom") else b"") + plain)
    run(path, tmp_path / "out", split="1,0,0", documents="blank-line", chunk_bytes=500)
    end = b"\n" if form.startswith("txt") else b""
    expected = [[*text.encode(), *end, 256] for text in TEXTS]
    if end:
        expected[-1].pop(-2)
    assert documents(tmp_path / "out") == expected


def zst_of_window(window, text):
    """A frame of one stored block, whose header asks for a window; 0xA8 is 2 GiB, 0xA9 an eighth more."""
    return b"\x28\xb5\x2f\xfd\x00" + bytes([window]) + (1 | len(text) << 3).to_bytes(3, "little") + text


def test_a_long_window_of_zstd_gives_the_same_documents(tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl.zst").write_bytes(zst_of_window(0xA8, plain[:5000]) + zst_of_window(0x90, plain[5000:]))
    run(tmp_path / "b.jsonl.zst", tmp_path / "out", split="1,0,0")
    assert documents(tmp_path / "out") == encoded(TEXTS)


def test_a_window_beyond_the_limit_is_no_damage(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zst_of_window(0xA9, b'{"text": "a"}\n'))
    with pytest.raises(ConfigError, match=r"window is larger than the limit of 2 GiB.*Recompress") as error:
        run(path, tmp_path / "out")
    assert "unreadable" not in str(error.value) and "emove" not in str(error.value)


def test_a_text_file_is_one_document_and_a_folder_its_files_in_order(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (folder / name).write_text(f"{name}\n\nsecond paragraph\n")
    (folder / "ignored.md").write_text("no")
    manifest = run(folder, tmp_path / "out", split="1,0,0")
    assert documents(tmp_path / "out") == encoded([f"{name}\n\nsecond paragraph\n" for name in ("a.txt", "b.txt", "sub/c.txt")])
    assert [source.path for source in manifest.sources] == ["a.txt", "b.txt", "sub/c.txt"]


def test_what_a_folder_leaves_out_is_named(tmp_path):
    folder = tmp_path / "in"
    for name in ("B.JSONL", "c.json", ".ipynb_checkpoints/b.jsonl", "sub/._x.jsonl", "d.jsonl.bz2", "a.JSONL.gz", "sub/E.Txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "a text"}\n')
    (folder / "a.JSONL.gz").write_bytes(gzip.compress(b'{"text": "a text"}\n'))
    manifest = run(folder, tmp_path / "out", split="1,0,0")
    assert [source.path for source in manifest.sources] == ["B.JSONL", "a.JSONL.gz", "sub/E.Txt"]
    reasons = {".ipynb_checkpoints": "hidden", "c.json": "unknown extension", "d.jsonl.bz2": "unknown extension", "sub/._x.jsonl": "hidden"}
    note = "4 left out of the sources: " + ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
    assert manifest.notes == Manifest.load(tmp_path / "out").notes == [note]
    assert f"note: {note}" in data_lines(tmp_path / "out", 0, 0)
    for name in ("B.JSONL", "a.JSONL.gz", "sub/E.Txt"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match=r"no text file in this folder, only .*c.json \(unknown extension\)"):
        run(folder, tmp_path / "out")


def test_linked_folders_are_read_once(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for name in ("in/real/b.txt", "elsewhere/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    for name, target in {"a": "real", "z": elsewhere, "up": "..", "self": ".", "real/up": "..", "broken": "nowhere", "me": "me"}.items():
        (folder / name).symlink_to(target)
    (elsewhere / "back").symlink_to(folder)
    (tmp_path / "top").symlink_to(folder)
    for given in (folder, tmp_path / "top"):
        sources, left_out = find_sources([given])
        assert [source.name for source in sources] == ["real/b.txt", "z/deep/c.txt"]
        read = ["a", "real/up", "self", "up", "z/back"]
        expected = [f"{name} (link to a folder that is read already)" for name in read] + ["broken (no file)", "me (no file)"]
        assert sorted(left_out) == sorted(expected)


BAD_LINES = {
    "malformed JSON": b'{"text": "cut o',
    "not UTF-8": b'{"text": "gr\xf6sse"}',
    "no text": b'{"body": "elsewhere"}',
    "empty document": b'{"text": " \\n"}',
    "blank line": b"",
}


def test_bad_records_are_counted_by_reason(tmp_path):
    good = [json.dumps({"text": text}).encode() for text in TEXTS[:3]]
    lines = [good[0], *BAD_LINES.values(), good[1], b'{"text": "\\ud800"}', b"[1]", b"[" * 100_000, b'{"text": 3}', good[2]]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    write_jsonl(tmp_path / "b.jsonl", TEXTS[3:5])
    manifest = run([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", split="1,0,0", chunk_bytes=30)
    assert documents(tmp_path / "out") == encoded(TEXTS[:5])
    assert [source.documents for source in manifest.sources] == [3, 2]
    expected = {"malformed JSON": 2, "not UTF-8": 2, "no text": 3, "empty document": 1, "blank line": 1}
    assert [source.skipped for source in manifest.sources] == [expected, {}]


@pytest.mark.parametrize(("reason", "workers"), [*((reason, 1) for reason in BAD_LINES), ("no text", 2)])
def test_strict_names_file_and_line(reason, workers, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "good"}\n' + BAD_LINES[reason] + b'\n{"text": "good"}\n')
    with pytest.raises(ConfigError) as error:
        prepare([source], tmp_path / "out", BYTES, Options(strict=True), workers=workers, chunk_bytes=20)
    assert str(error.value).startswith(f"{source}:2: {reason}. --strict")


def test_null_rows_of_parquet_are_counted(tmp_path):
    parquet.write_table(pa.table({"text": ["a", None, "", "b"]}), tmp_path / "a.parquet")
    manifest = run(tmp_path / "a.parquet", tmp_path / "out", split="1,0,0")
    assert manifest.sources[0].skipped == {"empty document": 1, "no text": 1}
    assert documents(tmp_path / "out") == encoded(["a", "b"])


def test_same_again_writes_nothing_and_anything_else_is_refused(tmp_path):
    source, out = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    first = run(source, out)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(source, out) == first
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    with pytest.raises(ConfigError, match=r"options.split: '90,5,5' -> '80,10,10'.*Choose another --out, or --overwrite"):
        run(source, out, split="80,10,10")
    source.write_text(source.read_text().replace("Document", "Documents"))
    with pytest.raises(ConfigError, match=r"sources.0.bytes: \d+ -> \d+; sources.0.sha256"):
        run(source, out)
    assert first == Manifest.load(out)
    changed = run(source, out, split="1,0,0", overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [NAME, "train.bin", "train.idx"]
    assert changed.sources != first.sources


def test_changed_result_is_not_taken_for_the_same(tmp_path):
    source, out = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    run(source, out)
    content = (out / "valid.bin").read_bytes()
    (out / "valid.bin").write_bytes(b"\0\0" + content[2:])
    with pytest.raises(ConfigError, match=r"valid.bin: another checksum"):
        run(source, out)


def test_files_of_another_origin_are_not_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.bin").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"holds train.bin but no manifest.json"):
        run(write_jsonl(tmp_path / "a.jsonl"), out)
    assert (out / "train.bin").read_bytes() == b"precious"


def test_a_bpe_is_trained_kept_and_decodes(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 5)
    tokenizer = TokenizerConfig(name="bpe", kind="bpe", vocab_size=300)
    manifest = run(source, tmp_path / "out", tokenizer=tokenizer)
    copy = prepare([source], tmp_path / "again", tokenizer, workers=2, chunk_bytes=5000)
    assert files(tmp_path / "again") == files(tmp_path / "out")
    assert copy.tokenizer.vocab_size == 300
    shutil.move(tmp_path / "out", tmp_path / "moved")
    loaded = from_manifest(Manifest.load(tmp_path / "moved"))
    held = documents(tmp_path / "moved")
    assert [loaded.decode(document) for document in held] == (TEXTS * 5)[: len(held)]
    assert all(document[-1] == manifest.tokenizer.eod_id and manifest.tokenizer.eod_id not in document[:-1] for document in held)
    (tmp_path / "moved/tokenizer.json").write_text((tmp_path / "moved/tokenizer.json").read_text() + " ")
    with pytest.raises(ConfigError, match="changed since the preparation"):
        from_manifest(Manifest.load(tmp_path / "moved"))


def character_bpe(path, characters):
    Backend(models.BPE({token: i for i, token in enumerate([EOD, *characters])}, [])).save(str(path))
    return TokenizerConfig(name="h", kind="huggingface", path=str(path))


def test_dropped_characters_are_counted_over_all_the_text(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["lies 7", "7 ö", "lies"] * 20)
    tokenizer = character_bpe(tmp_path / "t.json", "lies ")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</end>"}')
    manifest = run(source, tmp_path / "out", tokenizer=tokenizer, split="1,0,0", chunk_bytes=100)
    declared, dropped = manifest.notes
    assert "declares eos_token '</end>'" in declared
    assert dropped == "the tokenizer has no token for 60 characters of the text and drops them: '7' x 40, 'ö' x 20"
    prepare([source], tmp_path / "again", tokenizer, Options(split="1,0,0"), workers=2, chunk_bytes=300)
    assert files(tmp_path / "again") == files(tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_that_the_tokenizer_cannot_encode_is_named_and_leaves_nothing(workers, tmp_path):
    source, out, path = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out", tmp_path / "t.json"
    Backend(models.WordLevel({EOD: 0, "hello": 1})).save(str(path))
    with pytest.raises(ConfigError) as error:
        prepare([source], out, TokenizerConfig(name="h", kind="huggingface", path=str(path)), workers=workers)
    assert str(error.value).startswith(f"{path}: {source}:1: ") and "no unknown token" in str(error.value)
    run(source, out)


def test_shards_of_earlier_versions_count_no_dropped_characters(tmp_path):
    save_shard(tmp_path / "new.npz", Shard(np.ones(1, np.uint16), np.ones(1, int), np.ones(1, int), {0: (1, {})}, Counter("a")))
    assert load_shard(tmp_path / "new.npz").dropped == Counter("a")
    with np.load(tmp_path / "new.npz") as arrays:
        np.savez(tmp_path / "old.npz", **{name: arrays[name] for name in arrays if name != "dropped"})
    assert load_header(tmp_path / "old.npz")[1:] == ({0: (1, {})}, Counter())


def test_large_vocabularies_are_stored_in_32_bits(tmp_path, monkeypatch):
    from ngpt.data import tokenizers

    monkeypatch.setattr(tokenizers.BytesTokenizer, "vocab_size", 70_000)
    monkeypatch.setattr(tokenizers.BytesTokenizer, "eod_id", 69_999)
    manifest = run(write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out", split="1,0,0")
    assert manifest.dtype == "int32"
    assert documents(tmp_path / "out") == [[*text.encode(), 69_999] for text in TEXTS]
    assert IndexedReader(tmp_path / "out/train").tokens.dtype == np.int32


def gz_cut(path):
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])


def zst_cut_in_its_last_frame(path):
    text = "".join(f'{{"text": "line {i}"}}\n' for i in range(100_000)).encode()
    path.write_bytes(zstandard.compress(text) + zstandard.compress(text)[:-5])


def zst_damaged(path):
    path.write_bytes(zstandard.compress(b'{"text": "a"}\n' * 1000)[:-4] + b"1234")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.csv", lambda path: path.write_text("x"), "unknown extension. Known ones: .txt, .jsonl"),
        ("a.parquet.gz", lambda path: path.write_text("x"), "unknown extension"),
        ("a.jsonl", lambda path: None, "no such file or folder"),
        ("folder", lambda path: path.mkdir(), "no text file in this folder"),
        ("a.jsonl.gz", gz_cut, "unreadable: Compressed file ended"),
        ("a.jsonl.gz", lambda path: path.write_text("plain"), "unreadable: Not a gzipped file"),
        ("a.jsonl.zst", lambda path: path.write_text("plain"), "unreadable: "),
        ("a.jsonl.zst", zst_cut_in_its_last_frame, "unreadable: Compressed file ended before"),
        ("a.jsonl.zst", zst_damaged, "unreadable: "),
        ("a.parquet", lambda path: path.write_text("x"), "unreadable: "),
        ("a.parquet", lambda path: parquet.write_table(pa.table({"body": ["x"]}), path), "no column 'text'. It has body"),
        ("a.jsonl", lambda path: path.write_bytes(b""), "no documents (nothing there)"),
        ("a.jsonl", lambda path: path.write_text('{"body": "x"}\n'), "the text's key with --text-key; the first record has body"),
        ("a.jsonl", lambda path: path.write_text('{"text": 1}\n'), "no documents (1 x no text). There must be one at least. Check format"),
        ("a.txt", lambda path: path.write_bytes("größe".encode("utf-16")), "no documents (1 x not UTF-8)"),
        ("a.txt", lambda path: path.write_text("one document"), "--split: 90,5,5. valid gets no document of 1: "),
    ],
)
def test_unusable_inputs_are_refused(name, make, message, tmp_path):
    make(tmp_path / name)
    with pytest.raises(ConfigError) as error:
        run(tmp_path / name, tmp_path / "new/out")
    assert message in str(error.value)
    # Nothing stays but shards of what could be read, from which the same command continues.
    assert not (tmp_path / "new").exists() or list((tmp_path / "new/out/.prepare").glob("*.npz"))


@pytest.mark.parametrize(
    ("name", "text", "documents", "told"),
    [
        ("a.txt", "a\n\nb\n\nc", "file", "--documents blank-line, by which a document of a .txt ends at a blank line, or more files"),
        ("a.txt", "one\ntwo", "blank-line", "more blank lines in the text, where its documents end, or more files"),
        ("a.jsonl", '{"text": "one"}\n', "file", "more records or files"),
    ],
)
def test_what_gives_more_documents_is_never_what_was_given(name, text, documents, told, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        run(tmp_path / name, tmp_path / "out", documents=documents)
    assert str(error.value).endswith(f"Use 100,0,0, or more documents: {told}")
    if "blank-line" in told:  # and it helps
        assert list(run(tmp_path / name, tmp_path / "out", documents="blank-line").splits) == ["train", "valid", "test"]


def test_unusable_options_are_refused(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    for split in ("90,10", "a,b,c", "0,50,50", "110,-5,-5", "1/0,1,1", ""):
        with pytest.raises(ConfigError, match="Three shares"):
            run(source, tmp_path / "out", split=split)
    with pytest.raises(ConfigError, match="One of file, blank-line"):
        run(source, tmp_path / "out", documents="page")
    with pytest.raises(ConfigError, match="named twice"):
        run([source, source], tmp_path / "out")
    assert not (tmp_path / "out").exists()
