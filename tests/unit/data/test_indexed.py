import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from ngpt.config.errors import ConfigError
from ngpt.data.indexed import IndexedReader, dtype_for, write_indexed

DOCUMENTS = [[1, 2, 3, 256], [256], [7] * 1000 + [256], [0, 255, 256]]


def write(prefix, vocab_size, documents=DOCUMENTS):
    dtype = dtype_for(vocab_size)
    half = len(documents) // 2
    parts = [
        (np.concatenate(part).astype(dtype), np.array([len(document) for document in part]))
        for part in (documents[:half], documents[half:])
    ]
    return write_indexed(prefix, parts, dtype)


@pytest.mark.parametrize("vocab_size", [257, 65499, 65500, 131072])
def test_megatron_reads_what_is_written(tmp_path, vocab_size):
    assert dtype_for(vocab_size) == DType.optimal_dtype(vocab_size)
    last = [[vocab_size - 1, 0]]
    write(tmp_path / "a.b", vocab_size, DOCUMENTS + last)
    dataset = IndexedDataset(str(tmp_path / "a.b"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS + last
    assert dataset.document_indices.tolist() == list(range(len(DOCUMENTS) + 2))
    assert dataset.get(2, offset=998, length=3).tolist() == [7, 7, 256]


@pytest.mark.parametrize("vocab_size", [257, 131072])
def test_files_are_megatrons_builders_bytes(tmp_path, vocab_size):
    written = write(tmp_path / "ours", vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype_for(vocab_size).type)
    for document in DOCUMENTS:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix, size in (("bin", written.bin_bytes), ("idx", written.idx_bytes)):
        ours = (tmp_path / f"ours.{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs.{suffix}").read_bytes()
        assert len(ours) == size


def test_reader_returns_documents(tmp_path):
    write(tmp_path / "d", 257)
    reader = IndexedReader(tmp_path / "d")
    assert [document.tolist() for document in reader] == DOCUMENTS
    assert reader[-1].tolist() == DOCUMENTS[-1]
    assert reader.tokens.tolist() == sum(DOCUMENTS, [])


def test_reader_joins_a_document_of_several_sequences(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.uint16)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(torch.tensor([6]), [1])
    builder.finalize(str(tmp_path / "d.idx"))
    assert [document.tolist() for document in IndexedReader(tmp_path / "d")] == [[1, 2, 3, 4, 5], [6]]


@pytest.mark.parametrize("damage", ["missing", "magic", "short index", "short bin"])
def test_reader_refuses_damaged_files(tmp_path, damage):
    write(tmp_path / "d", 257)
    index, tokens = tmp_path / "d.idx", tmp_path / "d.bin"
    if damage == "missing":
        index.unlink()
    elif damage == "magic":
        index.write_bytes(b"x" + index.read_bytes()[1:])
    elif damage == "short index":
        index.write_bytes(index.read_bytes()[:-1])
    else:
        tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(ConfigError, match=str(tokens if damage == "short bin" else index)):
        IndexedReader(tmp_path / "d")


@pytest.mark.parametrize("place", ["pointer", "mark"])
def test_a_document_behind_a_damaged_entry_is_refused_by_name(tmp_path, place):
    lengths = np.array([3, 4])
    write_indexed(tmp_path / "d", [(np.arange(7), lengths)], np.dtype("<u2"))
    path = tmp_path / "d.idx"
    content = bytearray(path.read_bytes())
    start = 34 + 4 * 2 + (8 if place == "pointer" else 8 * 2 + 8)
    content[start : start + 8] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="d.idx: document 1.*damaged"):
        IndexedReader(tmp_path / "d")[1]
