"""The index of a distributed checkpoint, `.metadata`, read without running anything that it holds.

torch writes it with `pickle`, and `pickle.load` calls whatever a pickle names and sets its attributes. Here a name that torch's writer
uses becomes a record without behaviour. Any other name is refused. The real objects are built afterwards, from checked values.
"""

import copy
import dataclasses
import enum
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ngpt.config.errors import ConfigError

METADATA_FILE = ".metadata"
WAY_OUT = "Restore the file from a copy, or take another checkpoint"

_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_DTYPES = {("torch", str(value).removeprefix("torch.")): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
# The names in real checkpoints, dense and hybrid, in every precision and layout.
_REAL: dict[tuple[str, str], Any] = {
    (metadata.__name__, name): getattr(metadata, name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("pathlib", "PosixPath"): Path,  # where it was saved
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _LAYOUTS.__getitem__,
}
_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype)


class ForbiddenClass(pickle.UnpicklingError):
    """A pickle names something that the checkpoints of this project do not hold."""


def refusal(file: Path | str, error: BaseException) -> ConfigError:
    """The error for a checkpoint file that names a forbidden class or cannot be read."""
    if isinstance(error, ForbiddenClass):
        rule = "Checkpoints hold numbers and settings; this name is on no list of theirs, and reading it could run code"
        return ConfigError(str(file), f"the file asks for {error}", rule, f"Do not trust it. {WAY_OUT}")
    cause = f"{type(error).__name__}: {error}".removesuffix(": ")[:300]
    return ConfigError(str(file), f"unreadable ({cause})", "The file is damaged, or no save of this project wrote it", WAY_OUT)


def read_metadata(path: Path | str) -> Metadata:
    """Reads `.metadata`. Needs no process group. The last file read is remembered: Megatron asks for it several times in one load.

    Args:
        path: The file, or the folder of the checkpoint.

    Returns:
        torch's index: what the checkpoint holds, and in which file and bytes of its folder.

    Raises:
        ConfigError: the file names a class that is not on the list, or is damaged.
        OSError: it cannot be opened.
    """
    path = Path(path) / METADATA_FILE if Path(path).is_dir() else Path(path)
    found = path.stat()
    read = _read(path.absolute(), found.st_ino, found.st_size, found.st_mtime_ns)
    return dataclasses.replace(  # callers change the object they get
        read,
        state_dict_metadata=dict(read.state_dict_metadata),
        storage_data=dict(read.storage_data),
        storage_meta=copy.copy(read.storage_meta),
    )


@functools.lru_cache(maxsize=1)  # an index of 100,000 tensors takes ten seconds
def _read(path: Path, *_version: int) -> Metadata:
    data = path.read_bytes()
    try:
        return _checked(_real(_Unpickler(data).load(), {}))
    except Exception as error:  # a pickle can raise anything: RecursionError, KeyError of a memo, EOFError, ...
        raise refusal(path, error) from None


class _Record:
    """Stands for an object of the pickle. Holds what it would be built from, and has no behaviour."""

    def __init__(self, kind: Any, arguments: tuple[Any, ...]) -> None:
        self.kind, self.arguments, self.state = kind, arguments, None


class _Name:
    """Stands for a class that the pickle names."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


# Opcodes of the pickles that torch writes, and those that name something, so that the error can give the name.
_OPCODES = (
    "PROTO FRAME STOP MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 "
    "BINFLOAT BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "GLOBAL STACK_GLOBAL INST PERSID BINPERSID NEWOBJ REDUCE BUILD"
).split()


class _Unpickler(pickle._Unpickler):
    """The unpickler written in Python. Its opcodes can be chosen. Unlike in the C one, no number in a file allocates memory ahead."""

    stack: list[Any]  # the attributes exist, but typeshed does not list them
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _DTYPES:
            return _DTYPES[module, name]
        if (module, name) not in _REAL:
            raise ForbiddenClass(f"{module}.{name}")
        return _Name(_REAL[module, name])

    def persistent_load(self, identity: Any) -> Any:
        raise ForbiddenClass("a persistent object")

    def _load_call(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        _expect(type(name) is _Name and type(arguments) is tuple, "it calls what is no class")
        self.append(_Record(name.kind, arguments))

    def _load_build(self) -> None:
        state = self.stack.pop()
        _expect(type(self.stack[-1]) is _Record, "it sets attributes of what is no object")
        self.stack[-1].state = state

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        table = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            _expect(type(table) is dict and type(key) in (str, _Record), "it has a key of another type")  # a deep tuple's hash can crash
            table[key] = value

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _OPCODES)},
        pickle.NEWOBJ[0]: _load_call,
        pickle.REDUCE[0]: _load_call,
        pickle.BUILD[0]: _load_build,
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
    }


def _real(value: Any, made: dict[int, Any]) -> Any:
    """Plain values as they are, records as the objects they stand for.

    Args:
        made: The result for each value, by its id: a pickle may hold one value in many places, nested ones too.
    """
    if type(value) in _PLAIN:
        return value
    if id(value) in made:
        return made[id(value)]
    if type(value) in (list, tuple):
        real = type(value)([_real(item, made) for item in value])
    elif type(value) is dict:
        real = {_real(key, made): _real(item, made) for key, item in value.items()}
    else:
        _expect(type(value) is _Record, "it holds a class itself")
        real = _built(value.kind, _real(value.arguments, made), _real(value.state, made))
    made[id(value)] = real
    return real


def _built(kind: Callable[..., Any], arguments: tuple[Any, ...], state: Any) -> Any:
    if kind is TensorProperties:
        properties = TensorProperties()
        properties.__setstate__(state)
        return properties
    if isinstance(kind, enum.EnumMeta) or not dataclasses.is_dataclass(kind):
        return kind(*arguments)
    return kind(**(state or {}))


def _checked(read: Any) -> Metadata:
    """Raises ValueError where something is not what torch's readers expect."""
    _expect(isinstance(read, Metadata), "it is no Metadata")
    _expect(isinstance(read.state_dict_metadata, dict) and isinstance(read.storage_data, dict), "its tables are no dictionaries")
    for name, entry in read.state_dict_metadata.items():
        _expect(isinstance(name, str) and isinstance(entry, TensorStorageMetadata | BytesStorageMetadata), f"entry {name!r}")
        if isinstance(entry, TensorStorageMetadata):
            _expect(isinstance(entry.properties, TensorProperties) and isinstance(entry.properties.dtype, torch.dtype), f"type of {name}")
            _expect(isinstance(entry.size, torch.Size) and isinstance(entry.chunks, list), f"size of {name}")
            _expect(all(isinstance(chunk, ChunkStorageMetadata) for chunk in entry.chunks), f"chunks of {name}")
    for index, place in read.storage_data.items():
        _expect(isinstance(index, MetadataIndex) and isinstance(place, filesystem._StorageInfo), f"place of {index!r}")
        in_folder = isinstance(place.relative_path, str) and place.relative_path not in ("", "..") and "/" not in place.relative_path
        _expect(in_folder, f"{place.relative_path!r} is no file of this folder")
        _expect(type(place.offset) is int and type(place.length) is int and min(place.offset, place.length) >= 0, f"bytes of {index.fqn}")
    _expect(read.storage_meta is None or isinstance(read.storage_meta, StorageMeta), "its storage_meta")
    return read


def _expect(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(words)
