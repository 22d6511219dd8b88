"""Objects and tensors of a checkpoint load as upstream loads them; what a file names besides is refused before it is called."""

import functools
import io
import os
import pickle
import random
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_ext.compat import checkpoint_pickles
from ngpt.checkpoint_metadata import read_metadata
from ngpt.config.errors import ConfigError


@pytest.fixture(autouse=True)
def patched(monkeypatch):
    """The patch in force, and taken back afterwards."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common
    from megatron.training import checkpointing
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    replaced = [
        (FileSystemReader, "read_metadata"),
        (FileSystemReader, "read_data"),
        (DefaultLoadPlanner, "load_bytes"),
        (serialization, "load_common"),
        (common, "load_common"),
        (checkpointing, "_get_checkpoint_format"),
        (dcp, "load"),
    ]
    for owner, name in replaced:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    assert checkpoint_pickles.install()


def settings() -> Namespace:
    """What Megatron's arguments hold besides plain values."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend, CudaGraphModule, InferenceCudaGraphScope

    enums = {"attention_backend": AttnBackend.auto, "model_type": ModelType.encoder_or_decoder, "exit_signal": signal.SIGTERM}
    scopes = {"cuda_graph": [next(iter(CudaGraphModule))], "inference_graph": next(iter(InferenceCudaGraphScope))}
    return Namespace(lr=1e-3, params_dtype=torch.bfloat16, data_path=["a", "b"], seed=7, **enums, **scopes)


def saved_state() -> dict[str, Any]:
    """Tensors, and objects of each kind that our checkpoints hold."""
    states = {"random_rng_state": random.Random(3).getstate(), "np_rng_state": numpy.random.RandomState(4).get_state()}
    states |= {"torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {"expert": torch.get_rng_state()}}
    common = {"args": settings(), "checkpoint_version": 3.0, "iteration": 8, "rerun": {"mode": None}, "groups": [{"lr": 1e-3}]}
    return {"weight": torch.arange(12.0).view(3, 4), "rng_state": [states], "common_state": [common], "extra_state": None}


def empty_state() -> dict[str, Any]:
    return {"weight": torch.zeros(3, 4), "rng_state": None, "common_state": None, "extra_state": 1}


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "iter_0000008"
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(saved_state(), storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
    return folder


def load(folder: Path) -> dict[str, Any]:
    state = empty_state()
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)  # else it fills a copy
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), planner=planner, no_dist=True)
    return state


def replace(folder: Path, name: str, data: bytes) -> None:
    """Makes the entry `name` of a checkpoint those bytes."""
    metadata = read_metadata(folder)
    index = next(index for index in metadata.storage_data if index.fqn == name)
    place = metadata.storage_data[MetadataIndex(index.fqn, index.offset)]
    with (folder / place.relative_path).open("ab") as shard:
        place.offset, place.length = shard.tell(), len(data)
        shard.write(data)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_what_was_saved_is_loaded(folder):
    loaded, saved = load(folder), saved_state()
    assert torch.equal(loaded["weight"], saved["weight"]) and loaded["extra_state"] is None
    assert loaded["common_state"] == saved["common_state"]
    states, wanted = loaded["rng_state"][0], saved["rng_state"][0]
    assert states["random_rng_state"] == wanted["random_rng_state"]
    assert torch.equal(states["torch_rng_state"], wanted["torch_rng_state"])
    draws = [numpy.random.RandomState() for _ in range(2)]
    for generator, state in zip(draws, (states, wanted), strict=True):
        generator.set_state(state["np_rng_state"])
    assert draws[0].randint(1 << 30, size=700).tolist() == draws[1].randint(1 << 30, size=700).tolist()


def test_what_libraries_add_for_the_process_is_not_used_and_kept(folder):
    replace(folder, "common_state", saved(functools.partial(print, "hello")))
    with torch.serialization.safe_globals([functools.partial]):
        before = set(torch.serialization.get_safe_globals())
        with pytest.raises(ConfigError, match="functools.partial"):
            load(folder)
        assert set(torch.serialization.get_safe_globals()) == before


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self): ...  # pickle lets what is called be a call itself


def saved(payload: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer, **options)
    return buffer.getvalue()


def torchscript(folder: Path) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Identity()), buffer)
    return buffer.getvalue()


def payloads(marker: str) -> dict[str, bytes]:
    """Ways to make the loading process create `marker`."""
    touch = Call(os.system, f"touch {marker}")
    code = f"__import__('pathlib').Path({marker!r}).touch()"
    return {
        "system": saved(touch),
        "eval": saved(Call(eval, code)),
        "exec": saved([1, {"deep": (Call(exec, code),)}]),
        "attribute_chain": saved(Call(Call(getattr, Call(__import__, "os"), "system"), f"touch {marker}")),
        "partial": saved(Call(functools.partial, os.system, f"touch {marker}")),
        "pickle_in_pickle": saved(Call(pickle.loads, pickle.dumps(touch))),
        "torch_file_in_a_buffer": saved(Call(torch.load, io.BytesIO(saved(touch)), None, None)),
        "storage_from_bytes": saved(Call(torch.storage._load_from_bytes, saved(touch))),
        "legacy": saved(touch, _use_new_zipfile_serialization=False),
        "protocol_4": saved(touch, pickle_protocol=4),
        "bare_pickle": pickle.dumps(touch, 2),
        "numpy_pickle": saved(numpy.array([touch], dtype=object)),
        "around_the_true_object": saved([saved_state()["common_state"], touch]),
    }


@pytest.mark.parametrize("entry", ["common_state", "rng_state", "extra_state", "weight"])
@pytest.mark.parametrize("kind", payloads("").keys())
def test_a_payload_in_a_shard_is_refused_by_file(folder, tmp_path, entry, kind):
    marker = tmp_path / "marker"
    replace(folder, entry, payloads(str(marker))[kind])
    with pytest.raises(ConfigError) as error:
        load(folder)
    assert not marker.exists()
    text = str(error.value)
    assert text.startswith(str(folder / "__0_0.distcp")) and "\n" not in text and len(text) < 700


def test_the_class_asked_for_is_named(folder, tmp_path):
    for kind, name in {"system": "posix.system", "eval": "eval", "partial": "functools.partial"}.items():
        replace(folder, "common_state", payloads(str(tmp_path / "marker"))[kind])
        with pytest.raises(ConfigError, match=f"asks for {name}"):
            load(folder)


@pytest.mark.parametrize("kind", payloads("").keys())
def test_a_payload_in_common_pt_is_refused(folder, tmp_path, kind):
    from megatron.core.dist_checkpointing import serialization

    marker = tmp_path / "marker"
    (folder / "common.pt").write_bytes(payloads(str(marker))[kind])
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    with pytest.raises(ConfigError) as error:
        serialization.load_common_state_dict(str(folder))
    assert not marker.exists()
    assert str(error.value).startswith(str(folder / "common.pt")) and "\n" not in str(error.value)


def test_a_common_pt_of_settings_is_read(folder):
    from megatron.core.dist_checkpointing import serialization

    (folder / "common.pt").write_bytes(saved({"args": settings()}))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert serialization.load_common_state_dict(str(folder)) == {"args": settings()}


def test_a_payload_in_the_index_is_one_line(folder, tmp_path):
    marker = tmp_path / "marker"
    (folder / ".metadata").write_bytes(pickle.dumps(Call(os.system, f"touch {marker}")))
    with pytest.raises(ConfigError, match="asks for posix.system"):
        load(folder)
    assert not marker.exists()


def test_other_formats_are_not_read(tmp_path):
    from megatron.training import checkpointing

    (tmp_path / "mp_rank_00").mkdir()
    (tmp_path / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="metadata.json is missing"):
        checkpointing._get_checkpoint_format(str(tmp_path), Namespace())


BROKEN = {"empty": b"", "torn": b"PK\x03\x04", "deep": b"\x80\x02" + b"]" * 100_000 + b".", "old_protocol": b"\x80\x02(lp0\n."}


@pytest.mark.parametrize("entry", ["common_state", "weight"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_entry_is_one_line(folder, entry, kind):
    replace(folder, entry, BROKEN[kind])
    with pytest.raises(ConfigError) as error:
        load(folder)
    assert "unreadable" in str(error.value) and "\n" not in str(error.value)


def test_a_script_is_refused(folder, tmp_path):
    replace(folder, "common_state", torchscript(tmp_path))
    with pytest.raises(ConfigError, match="unreadable"):
        load(folder)


class Parts:
    """Pickles as a numpy array of given parts."""

    def __init__(self, shape, code, data, byteorder="<"):
        self.parts = shape, code, data, byteorder

    def __reduce__(self):
        shape, code, data, byteorder = self.parts
        dtype = DType(code, byteorder)
        return numpy._core.multiarray._reconstruct, (numpy.ndarray, (0,), b"b"), (1, shape, dtype, False, data)


class DType:
    def __init__(self, code, byteorder):
        self.parts = code, byteorder

    def __reduce__(self):
        return numpy.dtype, (self.parts[0], False, True), (3, self.parts[1], None, None, None, -1, -1, 0)


def test_an_array_of_fitting_parts_is_read(folder):
    replace(folder, "common_state", saved(Parts((2,), "u4", b"\1\0\0\0\2\0\0\0")))
    assert load(folder)["common_state"].tolist() == [1, 2]


@pytest.mark.parametrize(
    "parts",
    [Parts((1000,), "u4", b"1234"), Parts((1,), "O8", b"12345678"), Parts((-1,), "u4", b"1234"), Parts((1,), "u4", b"1234", "x")],
    ids=["too_short", "pointers", "negative", "byte_order"],
)
def test_an_array_of_other_parts_is_refused(folder, parts):
    replace(folder, "common_state", saved(parts))
    with pytest.raises(ConfigError, match="unreadable"):
        load(folder)


def test_upstream_still_unpickles(upstream_source):
    assert "torch.load" in upstream_source("core/dist_checkpointing/strategies/common.py", "load_common")
    assert "load_bytes" not in upstream_source("core/dist_checkpointing/strategies/torch.py", "MCoreLoadPlanner")
    assert "'torch'" in upstream_source("training/checkpointing.py", "_get_checkpoint_format")
    checkpoint = Path(torch.__file__).parent / "distributed" / "checkpoint"
    assert "metadata = pickle.load(metadata_file)" in (checkpoint / "filesystem.py").read_text()
    assert "weights_only=False" in (checkpoint / "default_planner.py").read_text()
