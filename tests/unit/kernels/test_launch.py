"""The launcher hands over what Triton would, with a driver that records launches instead of a GPU's."""

import itertools
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ngpt.kernels.launch import Launcher


@triton.jit(do_not_specialize=["rows", "seed"])
def kernel(x_ptr, unused_ptr, y_ptr, rows, factor, seed: tl.int64, stride, WIDTH: tl.constexpr, UNUSED: tl.constexpr):
    for row in range(rows):
        column = tl.arange(0, WIDTH)
        x = tl.load(x_ptr + row * stride + column)
        tl.store(y_ptr + row * WIDTH + column, x * factor)


class Recorder:
    """Stands for a driver of a GPU of compute capability 9.0. `launches` holds (grid, which loaded kernel, arguments)."""

    def __init__(self):
        self.launches: list[tuple] = []
        self.utils = self
        self.loaded = itertools.count()

    def launcher_cls(self, source, metadata):
        def launch(*args) -> None:
            tensors_as_pointers = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args[9:]]
            self.launches.append((args[:3], args[4], tensors_as_pointers))

        return launch

    def load_binary(self, *args) -> tuple[int, int, int, int, int]:
        return 0, next(self.loaded), 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def recorder(monkeypatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(driver, "_active", recorder)
    kernel.device_caches.clear()
    yield recorder
    kernel.device_caches.clear()


@pytest.fixture
def launcher(recorder) -> Launcher:
    return Launcher(kernel, WIDTH=16, UNUSED=3, num_warps=2)


def lookups(monkeypatch) -> list[tuple]:
    """Filled with the grids of launches that go through Triton."""
    seen, through_triton = [], type(kernel).__getitem__
    monkeypatch.setattr(type(kernel), "__getitem__", lambda self, grid: seen.append(grid) or through_triton(self, grid))
    return seen


def test_a_second_launch_hands_over_the_same_without_asking_triton(recorder, launcher, monkeypatch):
    seen = lookups(monkeypatch)
    for rows, factor, seed, stride in ((4, 1.0, 0, 16), (5, 2.5, 2**62 + 1, 32)):
        x, y = torch.ones(rows, 32), torch.ones(rows, 16)
        launcher((rows, 2, 1), (x, None, y), (rows, factor, seed), (stride,))
        kernel[(rows, 2, 1)](x, None, y, rows, factor, seed, stride, WIDTH=16, UNUSED=3, num_warps=2)
        ours, triton_s = recorder.launches[-2:]
        assert ours == triton_s and ours[2] == [x.data_ptr(), None, y.data_ptr(), rows, factor, seed, stride, 16, 3]
    assert seen == [(4, 2, 1), (4, 2, 1), (5, 2, 1)]


@pytest.mark.parametrize("other", ["dtype", "stride", "stride_one", "alignment", "pointer"])
def test_arguments_that_triton_tells_apart_get_a_kernel_of_their_own(recorder, launcher, other):
    x, y = torch.ones(4, 17).flatten(), torch.ones(4, 16)
    tensors, specialized, unspecialized = (x, None, y), (16,), (4, 1.0, 7)
    for _ in range(2):
        launcher((1, 1, 1), tensors, unspecialized, specialized)
    if other == "dtype":
        tensors = (x.bfloat16(), None, y)
    elif other == "stride":
        specialized = (17,)
    elif other == "stride_one":
        specialized = (1,)
    elif other == "alignment":
        tensors = (x[1:], None, y)
    else:
        tensors = (x, y, y)
    launcher((1, 1, 1), tensors, unspecialized, specialized)
    kernel[(1, 1, 1)](*tensors, *unspecialized, *specialized, WIDTH=16, UNUSED=3, num_warps=2)
    launcher((1, 1, 1), (x, None, y), unspecialized, (16,))
    first, second, third, by_triton, last = (loaded for _, loaded, _ in recorder.launches)
    assert first == second == last and third == by_triton != first
