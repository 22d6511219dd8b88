"""Loading a checkpoint runs no code that it holds.

Upstream (torch 2.11, megatron-core 0.19.2): `pickle.load` of `.metadata` in `torch/distributed/checkpoint/filesystem.py:
FileSystemReader.read_metadata` and `torch.load(weights_only=False)` of the objects in the shards in `default_planner.py:
DefaultLoadPlanner.load_bytes`, which Megatron's planner inherits, call whatever a file names. `core/dist_checkpointing/strategies/
common.py: load_common` and the old formats that `training/checkpointing.py: _load_base_checkpoint` tells by the names of files leave it to
torch's default, which an environment variable can turn.
Reason: a checkpoint is data, whoever wrote it. It is read on resume and by checkpoint.load.
Goes when: upstream reads all of these with lists of what they may name.

`.metadata` is read by `ngpt.checkpoint_metadata`. Objects and tensors are read by torch's own restricted unpickler (`weights_only=True`:
tensors, plain containers, a small machine without imports), with the list below instead of the one that the process has gathered. NumPy's
pickles are rebuilt here from checked parts: NumPy itself trusts the sizes and flags in them.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint.api import CheckpointException

from ngpt.checkpoint_metadata import METADATA_FILE, ForbiddenClass, read_metadata, refusal
from ngpt.config.errors import ConfigError

# What objects of real checkpoints name beyond torch's own list: settings of the run that saved, its random states, rerun's state.
_CLASSES = (
    ("argparse", "Namespace"),
    ("signal", "Signals"),
    ("megatron.core.enums", "ModelType"),
    ("megatron.core.rerun_state_machine", "RerunDiagnostic"),
    ("megatron.core.rerun_state_machine", "RerunMode"),
    ("megatron.core.rerun_state_machine", "RerunState"),
    ("megatron.core.transformer.enums", "AttnBackend"),
    ("megatron.core.transformer.enums", "CudaGraphModule"),
    ("megatron.core.transformer.enums", "CudaGraphScope"),
    ("megatron.core.transformer.enums", "InferenceCudaGraphScope"),
    ("torch._C", "Generator"),  # random states of a run with CUDA graphs
)
_NAMED = re.compile(r"(?:GLOBAL|unrecognized function) (\S+)")
_DTYPE = re.compile(r"[biuf][1248]")


def install() -> bool:
    """Replaces the readers in this process."""
    import torch.distributed.checkpoint as dcp
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common
    from megatron.training import checkpointing
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if FileSystemReader.read_metadata is _read_metadata:
        return True
    FileSystemReader.read_metadata = _read_metadata
    FileSystemReader.read_data = _one_file_at_a_time(FileSystemReader.read_data)
    DefaultLoadPlanner.load_bytes = _load_bytes
    serialization.load_common = common.load_common = _load_common
    checkpointing._get_checkpoint_format = _only_our_format(checkpointing._get_checkpoint_format)
    dcp.load = _own_errors_unwrapped(dcp.load)
    return True


def load_object(stream: Any, **options: Any) -> Any:
    """`torch.load` of what `torch.save` wrote, which may name nothing but what is on the lists.

    Raises:
        ForbiddenClass: it names something else.
    """
    with _listed_names_alone():
        try:
            return torch.load(stream, weights_only=True, **options)
        except Exception as error:
            raise _plain(error) from None


@contextlib.contextmanager
def _listed_names_alone() -> Iterator[None]:
    """What torch's restricted unpickler may name inside: its own list and ours, not what libraries have added to this process."""
    listed = [(getattr(importlib.import_module(module), name), f"{module}.{name}") for module, name in _CLASSES]
    listed += [(_reconstruct, "numpy._core.multiarray._reconstruct"), (_reconstruct, "numpy.core.multiarray._reconstruct")]
    listed += [(_Array, "numpy.ndarray"), (_DType, "numpy.dtype")]
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(listed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(added)


def _plain(error: Exception) -> Exception:
    """torch's refusal without its forty lines on how to read the file all the same."""
    if isinstance(error, ForbiddenClass) or not isinstance(error, pickle.UnpicklingError):
        return error
    named = _NAMED.search(str(error))
    if named:
        return ForbiddenClass(named[1])
    return pickle.UnpicklingError(str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0])


class _DType:
    """Stands for a pickled `numpy.dtype`."""

    def __init__(self, code: str, *_flags: Any) -> None:
        if not (isinstance(code, str) and _DTYPE.fullmatch(code)):
            raise ValueError(f"numpy.dtype({code!r})")
        self.value = numpy.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|"):
            raise ValueError(f"byte order {state[1]!r}")
        self.value = self.value.newbyteorder(state[1])


class _Array(numpy.ndarray):
    """An array that checks the parts it is rebuilt from."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, data = state
        plain = type(dtype) is _DType and type(shape) is tuple and all(type(size) is int and size >= 0 for size in shape)
        if not (plain and type(data) is bytes and len(data) == math.prod(shape) * dtype.value.itemsize):
            raise ValueError("a numpy array whose parts do not fit")
        super().__setstate__((1, shape, dtype.value, bool(fortran), data))


def _reconstruct(*_: Any) -> _Array:
    return _Array((0,), numpy.uint8)


def _read_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        metadata = read_metadata(self._get_metadata_path(kwargs.get("rank")))
    except ConfigError as error:
        self.refused = error  # upstream looks for another file then, and says that this one is missing
        raise
    metadata.storage_meta = metadata.storage_meta or torch.distributed.checkpoint.metadata.StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(self: Any, read_item: Any, value: Any) -> None:
    """As upstream, except for the way of reading."""
    from torch.distributed.checkpoint._nested_dict import set_element

    loaded, name = load_object(value), read_item.dest_index.fqn
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


def _one_file_at_a_time(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """So that an error can name the file."""

    @functools.wraps(upstream)
    def read_data(self: Any, plan: Any, planner: Any) -> Any:
        files: dict[str, list[Any]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for file, items in files.items():
            try:
                with _listed_names_alone():
                    upstream(self, dataclasses.replace(plan, items=items), planner)
            # Not the file's fault: another shape is asked for, the disk or the device fails.
            except (AssertionError, OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except Exception as error:
                raise refusal(Path(self.path) / file, _plain(error)) from None
        return upstream(self, dataclasses.replace(plan, items=[]), planner)  # nothing: its result

    return read_data


def _load_common(checkpoint_dir: str) -> Any:
    file = Path(checkpoint_dir) / "common.pt"
    try:
        return load_object(file, map_location="cpu")
    except OSError:
        raise
    except Exception as error:
        raise refusal(file, error) from None


def _only_our_format(upstream: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(upstream)
    def get_checkpoint_format(checkpoint_name: str, args: Any) -> str:
        if not (Path(checkpoint_name) / "metadata.json").is_file():
            rule = f"A checkpoint of this project holds metadata.json and {METADATA_FILE}; other formats are not read"
            raise ConfigError(checkpoint_name, "metadata.json is missing", rule, "Restore the file, or take another checkpoint")
        return upstream(checkpoint_name, args)

    return get_checkpoint_format


def _own_errors_unwrapped(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """The error itself: torch gathers the errors of a load over the ranks, and wraps them."""

    @functools.wraps(upstream)
    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            return upstream(*args, **kwargs)
        except CheckpointException as error:
            causes = [cause for cause, _trace in error.failures.values()]
            causes += [getattr(argument, "refused", None) for argument in (*args, *kwargs.values())]
            own = next((cause for cause in causes if isinstance(cause, ConfigError)), None)
            raise own or error from None

    return load
