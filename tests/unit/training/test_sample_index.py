"""Cached sample indices: they follow the content of the data, and what is damaged is named and built again."""

import json
import os
import shutil

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from megatron_ext.training.data import _DatasetTokenizer
from megatron_ext.training.sample_index import ContentKeyedDataset, DatasetBuilder, damage
from ngpt.config import ConfigError
from ngpt.config.schema import TokenizerConfig
from ngpt.data.plan import Options
from ngpt.data.prepare import prepare


def make(folder, name, count, word="word"):
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": f"{word} {i} " * (i % 7 + 3)}) + "\n" for i in range(count)))
    prepare([source], folder / name, TokenizerConfig(name="bytes", kind="bytes"), Options(split="100,0,0"), workers=1, overwrite=True)
    return str(folder / name / "train")


def build(cache, *prefixes, samples=20):
    blend = (list(prefixes), [1.0] * len(prefixes))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        blend_per_split=[blend, None, None],
        path_to_cache=str(cache),
        tokenizer=_DatasetTokenizer(257, 256),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return DatasetBuilder(ContentKeyedDataset, [samples, 0, 0], lambda: True, config).build()[0]


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


@pytest.mark.parametrize("name", ["document_index", "sample_index", "shuffle_index", "BlendedDataset-train-dataset_sample_index"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named_and_built_again(tmp_path, capsys, kind, name):
    cache, prefixes = tmp_path / "cache", [make(tmp_path, "a", 20), make(tmp_path, "b", 20, "another")]
    first = tokens_of(build(cache, *prefixes))
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
