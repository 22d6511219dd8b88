"""The index of a checkpoint is read as torch reads it, and nothing in it is run or believed."""

import dataclasses
import pickle
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from ngpt.checkpoint_metadata import read_metadata
from ngpt.config.errors import ConfigError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint as torch writes it, with tensors of several types and an object."""
    folder = tmp_path_factory.mktemp("checkpoint")
    types = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)
    state = {f"layer.{index}": torch.ones(3, 4).to(dtype) for index, dtype in enumerate(types)}
    state["nested"] = {"list": [torch.zeros(2), {"an": "object"}]}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(str(folder)), no_dist=True)
    return folder


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refused(folder: Path, data: bytes) -> str:
    file = folder / ".metadata"
    file.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        read_metadata(folder)
    text = str(error.value)
    assert text.startswith(f"{file}: ") and "\n" not in text
    return text


def test_it_is_what_pickle_reads(checkpoint):
    with (checkpoint / ".metadata").open("rb") as file:
        whole = pickle.load(file)
    assert read_metadata(checkpoint) == whole == read_metadata(checkpoint / ".metadata")
    assert {type(key) for key in whole.storage_data} == {MetadataIndex}


def test_what_a_reader_does_with_it_and_a_new_file_under_its_name_are_seen(checkpoint, tmp_path):
    first = read_metadata(checkpoint)
    wanted = len(first.state_dict_metadata)
    first.state_dict_metadata.clear()
    first.storage_meta.load_id = "mine"
    again = read_metadata(checkpoint)
    assert len(again.state_dict_metadata) == wanted and again.storage_meta.load_id != "mine"
    file = tmp_path / ".metadata"
    file.write_bytes((checkpoint / ".metadata").read_bytes())
    assert read_metadata(file) == again
    refused(tmp_path, file.read_bytes()[:-1])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_call_is_refused_by_name_in_every_protocol(tmp_path, protocol):
    marker = tmp_path / "marker"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    text = refused(tmp_path, pickle.dumps(Call(eval, code), protocol))
    assert "eval" in text or "persistent" in text
    assert not marker.exists()


def test_a_payload_around_the_true_index_is_refused(checkpoint, tmp_path):
    marker = tmp_path / "marker"
    true = (checkpoint / ".metadata").read_bytes()
    code = f"(__import__('pathlib').Path({str(marker)!r}).touch(), __import__('pickle').loads({true!r}))[1]"
    assert "builtins.eval" in refused(tmp_path, pickle.dumps(Call(eval, code)))
    assert not marker.exists()


DCP = "torch.distributed.checkpoint.metadata"
STREAMS = {
    "instance_opcode": b"(S'touch marker'\nios\nsystem\n.",
    "object_opcode": b"(cos\nsystem\nS'touch marker'\no.",
    "attribute_of_a_listed_module": b"\x80\x04\x8c" + bytes([len(DCP)]) + DCP.encode() + b"\x8c\x0bos.path.sep\x93.",
    "extension_registry": b"\x80\x02\x82\x01.",
    "persistent_object": b"Psomething\n.",
    "call_of_a_value": b"\x80\x02K\x01)R.",
    "attributes_of_a_class": b"\x80\x02c" + DCP.encode() + b"\nMetadata\nN}U\x08__init__NsU\x01x\x86b.",
    "class_itself": b"\x80\x02c" + DCP.encode() + b"\nMetadata\n.",
    "huge_memo": b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".",
    "huge_bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".",
    "huge_string": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"abc.",
    "deep_list": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep_key": b"\x80\x02})" + b"\x85" * 2_000_000 + b"Ns.",
    "memo_of_nothing": b"\x80\x02h\x07.",
    "itself": b"\x80\x02]q\x00h\x00a.",
    "empty": b"",
    "text": b"not a pickle",
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_stream_that_no_save_writes_is_one_line(tmp_path, monkeypatch, stream):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, stream)
    assert not Path("marker").exists()


def test_every_beginning_of_an_index_is_one_line(checkpoint, tmp_path):
    true = (checkpoint / ".metadata").read_bytes()
    for length in range(0, len(true) - 1, 7):
        refused(tmp_path, true[:length])


@pytest.mark.parametrize("path", ["../other/__0_0.distcp", "/dev/zero", "..", "", 3])
def test_a_file_outside_the_folder_is_refused(checkpoint, tmp_path, path):
    metadata = read_metadata(checkpoint)
    index = next(iter(metadata.storage_data))
    metadata.storage_data[index] = _StorageInfo(path, 0, 1)
    assert "no file of this folder" in refused(tmp_path, pickle.dumps(metadata))


@pytest.mark.parametrize(
    "change",
    [
        {"state_dict_metadata": ["a list"]},
        {"state_dict_metadata": {"name": "a string"}},
        {"storage_data": None},
        {"storage_data": {"name": _StorageInfo("__0_0.distcp", 0, 1)}},
        {"storage_meta": "a string"},
    ],
)
def test_an_index_of_other_types_is_refused(checkpoint, tmp_path, change):
    refused(tmp_path, pickle.dumps(dataclasses.replace(read_metadata(checkpoint), **change)))


def test_a_place_that_torch_keeps_as_a_path_is_read(checkpoint, tmp_path):
    metadata = read_metadata(checkpoint)
    metadata.storage_meta.checkpoint_id = Path("somewhere") / "else"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert str(read_metadata(tmp_path).storage_meta.checkpoint_id) == "somewhere/else"


def test_a_missing_index_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metadata(tmp_path / ".metadata")
