"""Which GPUs this machine has. Asks the CUDA driver itself, since importing torch takes seconds."""

import ctypes
from functools import cache

CUDA_SUCCESS = 0
MAX_NAME_LENGTH = 128  # bytes


@cache
def gpu_names() -> tuple[str, ...]:
    """Names of the visible GPUs in order, respecting `CUDA_VISIBLE_DEVICES`; empty if there is no driver or no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if driver.cuInit(0) != CUDA_SUCCESS or driver.cuDeviceGetCount(ctypes.byref(count)) != CUDA_SUCCESS:
        return ()
    return tuple(_name(driver, index) for index in range(count.value))


def _name(driver: ctypes.CDLL, index: int) -> str:
    device = ctypes.c_int(0)
    buffer = ctypes.create_string_buffer(MAX_NAME_LENGTH)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(buffer, MAX_NAME_LENGTH, device)
    return buffer.value.decode()


def driver_version() -> str | None:
    """Version of NVIDIA's driver ("580.95.05"), or None if its management library does not report it."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    buffer = ctypes.create_string_buffer(MAX_NAME_LENGTH)
    if library.nvmlInit_v2() != CUDA_SUCCESS or library.nvmlSystemGetDriverVersion(buffer, MAX_NAME_LENGTH) != CUDA_SUCCESS:
        return None
    return buffer.value.decode()
