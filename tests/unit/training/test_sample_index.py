"""Cached sample indices: they follow the content of the data, and what is damaged is named and built again."""

import copy
import functools
import itertools
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets import gpt_dataset

from launch.resume_checks import reordered_samples
from megatron_ext.training.data import build_datasets
from megatron_ext.training.sample_index import damage
from ngpt.config import ConfigError, compose
from ngpt.config.schema import DataSource, TokenizerConfig
from ngpt.data.plan import Options
from ngpt.data.prepare import prepare


def make(folder, name, count, word="word"):
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": f"{word} {i} " * (i % 7 + 3)}) + "\n" for i in range(count)))
    prepare([source], folder / name, TokenizerConfig(name="bytes", kind="bytes"), Options(split="100,0,0"), workers=1, overwrite=True)
    return str(folder / name / "train")


@functools.cache
def tiny():
    return compose(["experiment=ngpt_tiny", "data=enwik8_bytes", "train.seq_length=16", "train.seed=1"])


def build(cache, *prefixes, samples=20, weights=None):
    cfg = copy.deepcopy(tiny())
    cfg.data.cache_dir = str(cache)
    cfg.data.train = [DataSource(path, weight) for path, weight in zip(prefixes, weights or [1.0] * len(prefixes), strict=True)]
    return build_datasets(cfg, samples, 0, "local")[0]


def tokens_of(dataset, samples=20):
    return np.stack([dataset[index]["tokens"].numpy() for index in range(samples)])


def files_of(cache):
    return {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}


def test_an_intact_entry_is_used_and_data_prepared_again_gets_its_own(tmp_path, capsys):
    cache, fresh = tmp_path / "cache", tmp_path / "fresh"
    prefix = make(tmp_path, "a", 20)
    first, before = tokens_of(build(cache, prefix)), files_of(cache)
    assert np.array_equal(tokens_of(build(cache, prefix)), first) and files_of(cache) == before
    make(tmp_path, "a", 200, "other")
    again = tokens_of(build(cache, prefix))
    assert np.array_equal(again, tokens_of(build(fresh, prefix))) and not np.array_equal(again, first)
    assert "note" not in capsys.readouterr().err


def test_data_that_moved_keeps_its_entry(tmp_path):
    cache = tmp_path / "cache"
    first, before = tokens_of(build(cache, make(tmp_path, "a", 20))), files_of(cache)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert np.array_equal(tokens_of(build(cache, str(tmp_path / "b" / "train"))), first) and files_of(cache) == before


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "wrong type": lambda path: np.save(path, np.load(path).astype(np.float64)),
    "objects": lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True),
    "changed": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
    "gone": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two sources, their samples and the cache in which those were built."""
    folder = tmp_path_factory.mktemp("built")
    prefixes = [make(folder, "a", 20), make(folder, "b", 20, "another")]
    return prefixes, tokens_of(build(folder / "cache", *prefixes)), folder / "cache"


@pytest.mark.parametrize("name", ["document_index", "sample_index", "shuffle_index", "BlendedDataset-train-dataset_sample_index"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named_and_built_again(tmp_path, capsys, built, kind, name):
    prefixes, first, intact = built
    cache = shutil.copytree(intact, tmp_path / "cache")
    path = next(path for path in sorted(cache.iterdir()) if path.name.endswith(f"{name}.npy"))
    stamp = path.stat()
    DAMAGES[kind](path)
    if path.exists():
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert np.array_equal(tokens_of(build(cache, *prefixes)), first)
    message = capsys.readouterr().err
    assert message.count("note: cached sample index") == 1 and str(path) in message and "built again" in message
    build(cache, *prefixes)
    assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"../x": [1, "a"]}', "[" * 100_000])
def test_a_damaged_record_is_named_and_built_again(tmp_path, capsys, content):
    cache, prefix = tmp_path / "cache", make(tmp_path, "a", 20)
    first = tokens_of(build(cache, prefix))
    record = next(cache.glob("*.json"))
    record.write_text(content)
    assert np.array_equal(tokens_of(build(cache, prefix)), first)
    assert f"{record} is damaged" in capsys.readouterr().err
    assert damage(cache, record.stem) is None


def test_indices_without_a_record_are_not_trusted(tmp_path, capsys):
    """A launch that was killed while it moved them leaves such."""
    cache, prefix = tmp_path / "cache", make(tmp_path, "a", 20)
    first = tokens_of(build(cache, prefix))
    record = next(cache.glob("*.json"))
    record.unlink()
    next(cache.glob("*document_index.npy")).write_bytes(b"half")
    assert np.array_equal(tokens_of(build(cache, prefix)), first)
    assert f"{record} is missing" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache_dir: .*file.*cannot be written"):
        build(tmp_path / "file", make(tmp_path, "a", 20))


@pytest.fixture
def laid_out(monkeypatch):
    """How Megatron lays out each source for a run of so many samples: its epochs, and whether it shuffles the last for itself."""
    seen, upstream = [], gpt_dataset._build_document_index

    def build_document_index(documents, epochs, state, separate_final_epoch):
        seen.append((epochs, separate_final_epoch))
        with monkeypatch.context() as patch:
            patch.setattr(gpt_dataset, "_build_document_index", upstream)  # which calls itself
            return upstream(documents, epochs, state, separate_final_epoch)

    monkeypatch.setattr(gpt_dataset, "_build_document_index", build_document_index)

    def laid_out(cache, sources, samples):
        seen.clear()
        build(cache, *(source.path for source in sources), samples=samples, weights=[source.weight for source in sources])
        return list(seen)

    return laid_out


def text_of(folder, tokens):
    """Prepared data of so many tokens, in documents of 64 and one that is longer."""
    lengths = [64] * (tokens // 64 - 1) + [64 + tokens % 64]
    (folder / f"{tokens}.jsonl").write_text("".join(json.dumps({"text": "x" * (length - 1)}) + "\n" for length in lengths))
    out = folder / f"of_{tokens}"
    manifest = prepare([folder / f"{tokens}.jsonl"], out, TokenizerConfig(name="bytes", kind="bytes"), Options(split="100,0,0"), workers=1)
    assert manifest.splits["train"].tokens == tokens
    return str(out / "train")


@pytest.mark.parametrize(("sources", "longest"), [([96], 25), ([512], 70), ([96, 512], 50)], ids=str)
def test_a_run_is_told_that_its_samples_are_reordered_where_megatron_lays_them_out_otherwise(tmp_path, laid_out, sources, longest):
    """A resumed run that is longer or shorter, through every border of an epoch."""
    data = [DataSource(text_of(tmp_path, tokens), 3.0 - index) for index, tokens in enumerate(sources)]
    layouts = {samples: laid_out(tmp_path / f"cache{samples}", data, samples) for samples in range(1, longest)}
    assert {apart for layout in layouts.values() for _, apart in layout} == {False, True}

    def config(samples):
        train = SimpleNamespace(steps=samples, global_batch_size=1, seq_length=16)
        return SimpleNamespace(train=train, data=SimpleNamespace(mock=False, train=data))

    for old, new in [(1, longest - 1), *itertools.pairwise(layouts), *itertools.pairwise(reversed(layouts))]:
        note, told = reordered_samples(config(old), config(new)), []
        for source, before, now in zip(data, layouts[old], layouts[new], strict=True):
            if before != now:
                otherwise = "" if before[0] != now[0] else ", the last one shuffled otherwise"
                told.append(f"{source.path}: {before[0]} -> {now[0]} epochs{otherwise}")
        assert f"({'; '.join(told)})" in note if told else note is None, (old, new)
