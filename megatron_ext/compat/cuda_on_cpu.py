"""Run Megatron's training loop on a machine without CUDA: device requests for `cuda` land on the CPU.

Upstream (megatron-core 0.19.2): `training/initialize.py: initialize_megatron` asserts `torch.cuda.is_available()`, and about 150 places in
`core/` and `training/` write `device='cuda'`, `torch.cuda.current_device()`, `Tensor.cuda()` or `pin_memory`, use streams, events and
memory figures, or recognise fp32 parameters by `param.type() == 'torch.cuda.FloatTensor'` (`core/optimizer/{optimizer,distrib_optimizer,
clip_grads}.py`).
Reason: the whole loop, with tensor, pipeline, expert and data parallelism over gloo, can be tried and tested on a laptop.
Goes when: upstream takes its device from a setting.

Four parts: packages that need a device are as if not installed, a `TorchFunctionMode` rewrites arguments of torch calls, attributes of
`torch.cuda` have stand-ins, and the same mode is re-entered around the autograd engine. `torch.cuda.is_available()` then answers True to
everything in the process, so only the entry point of a CPU run installs this, and own code must choose kernels by `tensor.is_cuda` instead.
"""

import contextlib
import logging
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch._dynamo  # torch's optimizers import it, and its tables must be made of the true torch.cuda
import torch.distributed
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_NEEDING_A_DEVICE = ("transformer_engine", "apex")  # Megatron uses their optimizers and norms wherever they can be imported
_installed = False


def install() -> bool:
    """Makes this process take the CPU for its CUDA device. Call it before Megatron is imported.

    Returns:
        True where it is in force, False where CUDA is present and nothing was done.
    """
    global _installed
    if _installed:
        return True
    if torch.cuda.is_available():
        return False
    for package in _NEEDING_A_DEVICE:
        sys.modules.setdefault(package, None)  # as if it were not installed
    torch.Tensor.record_stream = lambda tensor, stream: None  # torch checks the stream's class before a mode sees the call
    _switch_off_compilation()
    for name, stand_in in _device_stand_ins().items():
        setattr(torch.cuda, name, stand_in)
    for name, stand_in in _memory_stand_ins().items():
        setattr(torch.cuda, name, stand_in)
    for name, stand_in in _rng_stand_ins().items():
        setattr(torch.cuda, name, stand_in)
        setattr(torch.cuda.random, name, stand_in)
    torch.cuda.default_generators = (torch.default_generator,)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = _nothing
    _silence_rng_warning()
    _CudaToCpu().__enter__()
    _reenter_mode_in_backward()
    _installed = True
    return True


class _CudaToCpu(TorchFunctionMode):
    """Rewrites the arguments of torch calls that ask for a CUDA device, pinned memory or CUDA type names."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type:
            return _tensor_type(*args, **kwargs)
        if func is torch.Tensor.to and len(args) > 1 and _asks_for_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        elif func is torch.distributed.all_to_all_single:
            # Megatron's token counts are CPU tensors here (moe_utils.py: maybe_move_tensor_to_cpu leaves them alone); gloo wants integers.
            kwargs = {key: _split_sizes(value) if key.endswith("split_sizes") else value for key, value in kwargs.items()}
        if "device" in kwargs and _asks_for_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _asks_for_cuda(device: Any) -> bool:
    if isinstance(device, int):
        return not isinstance(device, bool)  # a bare index means that CUDA device
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


def _tensor_type(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.type`, which names or takes a CUDA type: Megatron tells fp32 parameters from others by that name."""
    if dtype is None:
        return tensor.type().replace("torch.", "torch.cuda.", 1)
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.", 1)
    return tensor.type(dtype, *args, **kwargs)


def _split_sizes(sizes: Any) -> Any:
    return sizes.tolist() if hasattr(sizes, "tolist") else sizes


def _reenter_mode_in_backward() -> None:
    # torch leaves a mode while it handles the call it caught, and `backward` is such a call: activation recompute would run outside.
    run = torch.autograd._engine_run_backward

    def run_in_mode(*args: Any, **kwargs: Any) -> Any:
        with _CudaToCpu():
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_in_mode


def _switch_off_compilation() -> None:
    # Megatron decorates small functions with torch.compile (core/jit.py): on a CPU that costs seconds of import and minutes of compiling.
    def compile_nothing(model: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        return (lambda function: function) if model is None else model

    torch.compile = compile_nothing
    torch._dynamo.config.disable = True  # functions decorated before this call


def _silence_rng_warning() -> None:
    # One generator serves as both the CPU's and CUDA's, so each use of Megatron's RNG tracker moves the other.
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _Event:
    """`torch.cuda.Event` on a device that runs everything at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded_s = 0.0

    def record(self, stream: Any = None) -> None:
        self._recorded_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        """Milliseconds from this event to `end`."""
        return (end._recorded_s - self._recorded_s) * 1e3


class _Stream:
    """`torch.cuda.Stream`: there is one order of execution, so nothing ever waits."""

    cuda_stream = 0
    stream_id = 0
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event


def _device_stand_ins() -> dict[str, Any]:
    """Device choice, streams and events."""
    stream = _Stream()
    properties = SimpleNamespace(name="cpu", major=0, minor=0, total_memory=psutil.virtual_memory().total, multi_processor_count=1)
    return {
        # Megatron's asserts, and torch's own lazy initialisation of CUDA, which returns at once where this says it is done.
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        # Every rank has its own device 0. The checkpoint worker divides by the count.
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": _nothing,
        # What `torch.cuda.device(...)` and stream contexts call.
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        # Capability 0.0: no kernel that asks for a minimum is chosen.
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        # Work is done when a call returns.
        "synchronize": _nothing,
        "Event": _Event,
        "Stream": _Stream,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": _nothing,
        "stream": contextlib.nullcontext,
        "is_current_stream_capturing": lambda: False,
    }


def _memory_stand_ins() -> dict[str, Any]:
    """Memory figures: those of the process, so that reports of memory mean something."""

    highest = 0

    def resident(device: Any = None) -> int:
        nonlocal highest
        current = psutil.Process().memory_info().rss
        highest = max(highest, current)
        return current

    def peak_resident(device: Any = None) -> int:
        # KiB on Linux. The kernel's peak comes from counters that are rough and late, so figures that were given out can be above it.
        resident()
        return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, highest)

    def stats(device: Any = None) -> dict[str, int]:
        current, peak = resident(), peak_resident()
        known = {
            f"{kind}_bytes.all.{when}": value
            for kind in ("allocated", "reserved")
            for when, value in (("current", current), ("peak", peak))
        }
        return defaultdict(int, known)

    def free_and_total(device: Any = None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    return {
        "memory_allocated": resident,
        "memory_reserved": resident,
        "device_memory_used": resident,
        "max_memory_allocated": peak_resident,
        "max_memory_reserved": peak_resident,
        "memory_stats": stats,
        "mem_get_info": free_and_total,
        # The process keeps its peak; it cannot be reset.
        "reset_peak_memory_stats": _nothing,
        "empty_cache": _nothing,
    }


def _rng_stand_ins() -> dict[str, Any]:
    """Random state: the CPU's generator, the one that the calls landing on the CPU draw from."""
    return {
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        # torch.manual_seed calls it after seeding the CPU's generator.
        "manual_seed_all": _nothing,
        "initial_seed": lambda: torch.initial_seed(),
    }
