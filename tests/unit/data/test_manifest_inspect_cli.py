import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from launch import cli
from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError
from ngpt.config.schema import DataSource, TokenizerConfig
from ngpt.data import fingerprint, indexed
from ngpt.data import verify as verification
from ngpt.data.fingerprint import is_record
from ngpt.data.inspect import blend, data_lines
from ngpt.data.manifest import Manifest, check_against_model
from ngpt.data.plan import Options
from ngpt.data.prepare import prepare
from ngpt.data.sources import format_of
from ngpt.data.tokenizers import train_bpe
from ngpt.data.verify import CHECKED, verify, verify_deep

BYTES = TokenizerConfig(name="bytes", kind="bytes")
BPE = TokenizerConfig(name="bpe", kind="bpe", vocab_size=270)


def make(folder, name, tokenizer=BYTES, count=50):
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": f"{name} says {i} " * 5}) + "\n" for i in range(count)))
    prepare([source], folder / name, tokenizer, workers=1)
    return folder / name


def test_verify_sees_any_change_of_a_small_file_also_under_an_old_time_stamp(tmp_path):
    out = make(tmp_path, "a")
    verify(out / "train")
    tokens = out / "train.bin"
    content, times = tokens.read_bytes(), tokens.stat()
    changed = bytes([content[0] ^ 1]) + content[1:]

    tokens.write_bytes(content[:-2])
    with pytest.raises(ConfigError, match=r"bytes\. manifest.json says \d+: it changed since its preparation"):
        verify(out / "train")
    tokens.write_bytes(changed)
    os.utime(tokens, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ConfigError, match="another checksum"):
        verify(out / "train")
    tokens.write_bytes(content)
    verify(out / "train")
    (out / "train.idx").unlink()
    with pytest.raises(ConfigError, match=r"train.idx: no such file"):
        verify(out / "train")


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Prepared data whose files count as large ones; its manifest has hashes of their blocks."""
    for module in (indexed, verification):
        monkeypatch.setattr(module, "WHOLE_BYTES", 10)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 64)
    monkeypatch.setattr(fingerprint, "BLOCKS", 6)
    return make(tmp_path, "large", count=200)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def without_blocks(folder):
    """Turn a manifest into one of earlier versions."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    for split in content["splits"].values():
        del split["bin_blocks"], split["idx_blocks"]
    path.write_text(json.dumps(content))


def test_large_files_are_compared_by_blocks_and_deeply_by_all_bytes(large):
    record = Manifest.load(large).splits["train"].bin_blocks
    assert len(record.split()) == 6
    verify(large / "train")
    assert not (large / CHECKED).exists()
    numbers = {int(entry.partition(":")[0]) for entry in record.split()}
    unseen = next(number for number in range(1000) if number not in numbers)
    flip(large / "train.bin", unseen * 64)
    verify(large / "train")
    with pytest.raises(ConfigError, match="train.bin: another checksum"):
        verify_deep([large / "train"])
    flip(large / "train.bin", -1)
    with pytest.raises(ConfigError, match=r"train.bin: another content at byte \d+.*changed since its preparation.*--deep"):
        verify(large / "train")


def test_blocks_of_data_of_earlier_versions_are_recorded_at_its_first_use(large):
    without_blocks(large)
    verify(large / "train")
    assert set(json.loads((large / CHECKED).read_text())) == {"train.bin", "train.idx"}
    verify(large / "train")
    flip(large / "train.bin", 0)
    with pytest.raises(ConfigError, match="another content at byte 0.*since they were recorded"):
        verify(large / "train")


@pytest.mark.parametrize("content", ["[]", "null", "{", "7", '{"train.bin": []}', '{"train.bin": {"sha256": 5}}', "[" * 100_000])
def test_a_damaged_record_of_blocks_is_made_again(large, content):
    without_blocks(large)
    (large / CHECKED).write_text(content)
    verify(large / "train")
    assert is_record(json.loads((large / CHECKED).read_text())["train.bin"]["blocks"])


def test_blocks_of_a_folder_that_cannot_be_written_are_recorded_elsewhere(large, tmp_path, monkeypatch):
    without_blocks(large)
    monkeypatch.setattr(verification.os, "access", lambda path, mode: False)
    verify(large / "train")
    verify(large / "train", tmp_path / "cache")
    assert not (large / CHECKED).exists() and len(list((tmp_path / "cache").iterdir())) == 1
    flip(large / "train.bin", 0)
    with pytest.raises(ConfigError, match="another content at byte 0"):
        verify(large / "train", tmp_path / "cache")


def test_inspect_deep_reads_every_byte(large, capsys):
    assert cli.main(["data", "inspect", str(large), "--deep", "--samples", "0"]) == 0
    assert "all bytes are those that were prepared" in capsys.readouterr().out
    for name in ("train.bin", "valid.idx"):
        flip(large / name, 40)
    assert cli.main(["data", "inspect", str(large), "--deep"]) == 2
    error = capsys.readouterr().err
    assert "train.bin: another checksum" in error and "valid.idx: another checksum" in error


def test_manifests_of_odd_types_are_unreadable(tmp_path):
    out = make(tmp_path, "a")
    path = out / "manifest.json"
    content = json.loads(path.read_text())
    splits, source = content["splits"], content["sources"][0]
    for damaged in (
        content | {"sources": [source | {"skipped": "none"}]},
        content | {"sources": [source | {"bytes": "many"}]},
        content | {"splits": splits | {"train": splits["train"] | {"tokens": 0}}},
        content | {"splits": splits | {"train": splits["train"] | {"bin_bytes": -4}}},
        content | {"splits": splits | {"train": splits["train"] | {"bin_blocks": "0:0"}}},
        content | {"splits": splits | {"../train": splits["train"]}},
        content | {"splits": []},
        content | {"options": None},
        content | {"notes": [1]},
        content | {"tokenizer": content["tokenizer"] | {"vocab_size": True}},
        content | {"more": 1},
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(ConfigError, match="unreadable.*Prepare the data again"):
            Manifest.load(out)
    path.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="unreadable"):
        Manifest.load(out)


def test_manifests_of_earlier_versions_have_no_notes(tmp_path):
    path = make(tmp_path, "a") / "manifest.json"
    content = json.loads(path.read_text())
    assert content.pop("notes") == []
    path.write_text(json.dumps(content))
    assert Manifest.load(path.parent).notes == []


def test_manifest_errors(tmp_path):
    out = make(tmp_path, "a")
    with pytest.raises(ConfigError, match=r"nowhere/train: not prepared data.*nowhere/manifest.json.*ngpt data prepare"):
        verify(tmp_path / "nowhere/train")
    with pytest.raises(ConfigError, match=r"a: a folder of prepared data.*Name one: .*a/train"):
        verify(out)
    with pytest.raises(ConfigError, match="no split 'trian'. The folder holds train, valid, test"):
        verify(out / "trian")
    path = out / "manifest.json"
    content = path.read_text()
    for damaged in (
        content[:-20],
        "[]",
        content.replace('"dtype"', '"type"'),
        content.replace('"format_version": 1', '"format_version": 2'),
    ):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match="Prepare the data again"):
            Manifest.load(out)


def test_model_and_sources_must_agree(tmp_path):
    first, second, bpe = make(tmp_path, "a"), make(tmp_path, "b"), make(tmp_path, "c", BPE)
    other = make(tmp_path, "d", replace(BPE, vocab_size=280))

    def check(*folders, tokenizer=BYTES, vocab_size=257):
        return check_against_model([DataSource(str(folder / "train")) for folder in folders], tokenizer, vocab_size)

    assert [manifest.folder for manifest in check(first, second)] == [first, second]
    check(bpe, tokenizer=BPE, vocab_size=270)
    check(bpe, tokenizer=replace(BPE, path=str(bpe / "tokenizer.json")), vocab_size=300)
    with pytest.raises(ConfigError, match=r"model.vocab_size: 256. .*has 257 entries.*Set model.vocab_size=257"):
        check(first, vocab_size=256)
    with pytest.raises(ConfigError, match="tokenizer kind bpe. tokenizer.kind is bytes"):
        check(first, bpe)
    with pytest.raises(ConfigError, match="a blend needs one"):
        check(bpe, other, tokenizer=BPE, vocab_size=300)
    with pytest.raises(ConfigError, match="other tokens under the same numbers"):
        check(bpe, tokenizer=replace(BPE, path=str(other / "tokenizer.json")), vocab_size=300)


def test_blend_gives_tokens_and_epochs(tmp_path):
    first, second = make(tmp_path, "a"), make(tmp_path, "b", count=150)
    sources = [DataSource(str(first / "train"), 3.0), DataSource(str(second / "train"), 1.0)]
    rows = blend(sources, 1_000_000)
    held = [Manifest.load(folder).splits["train"].tokens for folder in (first, second)]
    assert [row.tokens_drawn for row in rows] == [750_000, 250_000]
    assert [row.epochs for row in rows] == pytest.approx([750_000 / held[0], 250_000 / held[1]])
    for weights in ((0, 0), (2, -1)):
        with pytest.raises(ConfigError, match="data.train"):
            blend([DataSource(source.path, weight) for source, weight in zip(sources, weights, strict=True)], 10)


def test_samples_are_decoded(tmp_path):
    out = make(tmp_path, "a", BPE)
    shown = "\n".join(data_lines(out / "valid", samples=100, characters=10))
    assert "a says 49 " not in shown and "a says 46 " in shown and "train" not in shown
    assert "a.jsonl: " in "\n".join(data_lines(out, samples=0, characters=0))


def test_commands_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "line {i}"}}\n' for i in range(40)) + "broken\n")
    assert cli.main(["data", "prepare", "x.jsonl", "--workers", "1"]) == 0
    assert "skipped: 1 malformed JSON" in capsys.readouterr().out
    bpe = ["--tokenizer", "bpe", "--vocab-size", "260", "--split", "1,0,0", "--out", "1"]
    assert cli.main(["data", "prepare", "x.jsonl", "--workers", "1", *bpe]) == 0
    config = compose(shlex.split(capsys.readouterr().out.splitlines()[-1])[2:])  # of a split without text to validate on
    assert (config.model.vocab_size, config.data.valid, config.run.name) == (260, [], "1")
    assert cli.main(["data", "inspect", "data/x_bytes"]) == 0
    assert "line 0" in capsys.readouterr().out
    overrides = [
        "experiment=ngpt_tiny",
        "data.train=[{path: data/x_bytes/train}]",
        "data.valid=[]",
        "data.mock=false",
        "train.eval_steps=0",
    ]
    assert cli.main(["data", "inspect", *overrides]) == 0
    assert "100.00%" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a b", "lang=en", "a,b", "[x]", "{x: y}", "it's", 'q"q', "语料", os.fsdecode(b"\xff\xfe"), "${a}", "%d"])
def test_any_name_of_files_and_folders_works(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.jsonl").write_text("".join(f'{{"text": "line {i}"}}\n' for i in range(40)))
    parquet.write_table(pa.table({"text": ["row"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").rename(folder / f"{name}.parquet")
    (folder / f"{name}.bz2").touch()
    (folder / f"{name}.json").write_text(train_bpe(["line " * 20] * 20, 260))
    prepare_it = ["data", "prepare", name, "--tokenizer", "huggingface", "--tokenizer-path", f"{name}/{name}.json", "--workers", "1"]
    for again in (False, True):
        assert cli.main(prepare_it) == 0, again
    shown = name.encode(errors="backslashreplace").decode()
    prepared = f"data/{name}_huggingface"
    if shown == name:  # the printed command can be pasted
        words = shlex.split(capsys.readouterr().out.splitlines()[-1])
        assert words[:2] == ["ngpt", "train"]
        config = compose(words[2:])
        assert [source.path for source in (*config.data.train, *config.data.valid)] == [f"{prepared}/train", f"{prepared}/valid"]
        assert config.tokenizer.path == f"{prepared}/tokenizer.json" and Path(config.tokenizer.path).exists()
    for what in ([prepared], [f"{prepared}/train", str(tmp_path / prepared)]):
        assert cli.main(["data", "inspect", *what, "--deep"]) == 0
        out = capsys.readouterr().out
        assert f"source {shown}.jsonl: " in out and f"{shown}.bz2 (unknown extension)" in out and "line 0" in out
    assert [source.path for source in Manifest.load(prepared).sources] == [f"{name}.jsonl", f"{name}.parquet"]
    verify(f"{prepared}/train", tmp_path / "cache")


def test_of_many_sources_the_first_are_shown_and_the_others_counted(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "one"}\n\n')
    prepare([tmp_path], tmp_path / "out", BYTES, workers=1, options=Options(split="100,0,0"))
    lines = [line for line in data_lines(tmp_path / "out", 0, 0) if line.startswith(("source ", "... "))]
    assert [line.split(":")[0] for line in lines[:5]] == [f"source {number}.jsonl" for number in range(5)]
    assert lines[5:] == ["... and 4 more: 68 bytes, 4 documents; skipped: 4 blank line"]


def test_a_path_with_an_equals_sign_that_is_absent_is_no_override(tmp_path, capsys):
    assert cli.main(["data", "inspect", str(tmp_path / "a=b")]) == 2
    assert "a=b: not prepared data" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/below", "x" * 300])
def test_an_output_folder_that_the_system_refuses_is_named(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a text")
    (tmp_path / "x.txt").write_text("a text")
    assert cli.main(["data", "prepare", "x.txt", "--out", out, "--split", "1,0,0"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"--out: {out}. ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "nothing"], "Known texts: enwik8, enwik8_small"),
        (["prepare", "enwik8"], "Run `ngpt data fetch enwik8`"),
        (["prepare", "x.txt", "--tokenizer", "words"], "Files of conf/tokenizer: bpe, bytes"),
        (["prepare", "x.txt", "--tokenizer", "huggingface"], "tokenizer.path: null"),
        (["prepare", "x.txt", "--tokenizer", "bpe", "--vocab-size", "99999999999"], "tokenizer.vocab_size: 99999999999"),
        (["prepare", "x.txt", "--tokenizer", "bpe", "--vocab-size", "0"], "tokenizer.vocab_size: 0"),
        (["prepare", "x.txt", "y.txt"], "--out: not given"),
        (["prepare", "nowhere.txt"], "no such file or folder"),
        (["inspect", "nowhere/train"], "Prepare it, ngpt data prepare INPUT --out nowhere, or correct the path"),
        (["inspect", "nowhere"], "nowhere: not prepared data"),
        (["inspect", "x.txt"], "Prepare it, ngpt data prepare x.txt, or correct the path"),
        (["inspect", "texts"], "Prepare it, ngpt data prepare texts, or correct the path"),
        (["inspect", "John's texts"], 'Prepare it, ngpt data prepare "John\'s texts", or correct the path'),
        (["inspect", "nowhere", "a=b"], "Either paths or overrides"),
        (["inspect", "experiment=nothing"], "nothing"),
    ],
)
def test_user_errors_are_told_without_a_traceback(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "y.txt").write_text("y")
    for folder in ("texts", "John's texts"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("x")
    assert cli.main(["data", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err and not out
    assert not (tmp_path / "data").exists()  # a mistake leaves no beginning that a corrected command stumbles over


@pytest.mark.parametrize("name", ["x.md", "x", "empty"])
def test_nobody_is_told_to_prepare_what_would_be_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if name != "empty":
        (tmp_path / name).write_text("a text")
    assert cli.main(["data", "prepare", name]) == 2 and capsys.readouterr().err
    assert cli.main(["data", "inspect", name]) == 2
    err = capsys.readouterr().err
    assert f"{name}: not prepared data" in err and f"data prepare {name}" not in err
    assert err.endswith("Name a folder that `ngpt data prepare` has written, or a split in one\n")


def test_formats_by_extension(tmp_path):
    names = {"a.txt": "txt", "a.b.jsonl.gz": "jsonl", "a.txt.zst": "txt", "a.parquet": "parquet", "a.gz": None, "a": None, "txt": None}
    assert {name: format_of(tmp_path / name) for name in names} == names


def test_data_commands_import_nothing_slow():
    modules, slow = "cli, prepare, inspect, entropy", {"torch", "megatron", "fsspec", "sentencepiece", "huggingface_hub"}
    code = f"import sys; from ngpt.data import {modules}; sys.exit(bool({slow} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=os.path.dirname(cli.__file__) + "/../..").returncode == 0
