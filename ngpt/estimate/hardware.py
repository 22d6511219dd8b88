"""What the GPUs can do: matrix-product rates, memory and links. The one table of such figures, for MFU and for estimates."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU in the module its name stands for (SXM, HGX or NVL72).

    Attributes:
        rates: dense FLOP/s (no structured sparsity) by the dtype of the operands; the GPU has no tensor cores for a missing one. fp32 is
            without TF32, as the local backend multiplies; Transformer Engine multiplies fp32 matrices in TF32.
        memory: bytes that a process can allocate, before what CUDA itself takes.
        hbm: bytes/s of its memory.
        nvlink: bytes/s to the other GPUs of its NVLink domain, each way.
        nvlink_domain: GPUs that NVLink connects.
        network: bytes/s of its network adapter, each way.
    """

    rates: dict[str, float]
    memory: float
    hbm: float
    nvlink: float
    nvlink_domain: int
    network: float


_MIB = 2**20
_HOPPER = {"bf16": 989.4e12, "fp8": 1978.9e12, "tf32": 494.7e12, "fp32": 66.9e12}
_BLACKWELL = {"bf16": 2250e12, "fp8": 4500e12, "mxfp8": 4500e12, "tf32": 1100e12, "fp32": 75e12}
_GRACE_BLACKWELL = {"bf16": 2500e12, "fp8": 5000e12, "mxfp8": 5000e12, "tf32": 1250e12, "fp32": 80e12}

# Source: NVIDIA's datasheets (A100 SXM, H100 SXM, H200 SXM, HGX B200 and B300, GB200 and GB300 NVL72 divided by 72); Hopper's 989.4 is
# the unrounded figure of its architecture whitepaper. Memory of A100 to B200: the driver's figure in MiB; of the others: the datasheet's.
# Network: one adapter a GPU as NVIDIA's reference systems have it (200 Gb/s A100; 400 Gb/s H100 to GB200; 800 Gb/s B300, GB300).
GPUS: dict[str, Gpu] = {
    "a100": Gpu({"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}, 81920 * _MIB, 2.039e12, 300e9, 8, 25e9),
    "h100": Gpu(_HOPPER, 81559 * _MIB, 3.35e12, 450e9, 8, 50e9),
    "h200": Gpu(_HOPPER, 143771 * _MIB, 4.8e12, 450e9, 8, 50e9),
    "b200": Gpu(_BLACKWELL | {"nvfp4": 9000e12}, 183359 * _MIB, 7.7e12, 900e9, 8, 50e9),
    "b300": Gpu(_BLACKWELL | {"nvfp4": 13500e12}, 270e9, 7.7e12, 900e9, 8, 100e9),
    "gb200": Gpu(_GRACE_BLACKWELL | {"nvfp4": 10000e12}, 186e9, 8e12, 900e9, 72, 50e9),
    "gb300": Gpu(_GRACE_BLACKWELL | {"nvfp4": 15000e12}, 279e9, 8e12, 900e9, 72, 100e9),
}


def gpu_of_device(device_name: str) -> str | None:
    """The table's name of a device as CUDA names it ("NVIDIA H100 80GB HBM3" is h100), or None if it is not in the table.

    The PCIe and NVL boards run slower than the SXM modules of the table and are left unknown.
    """
    name = device_name.lower()
    if "pcie" in name or "nvl" in name.split():
        return None
    # The longest first: "GB200" also contains "B200".
    return next((gpu for gpu in sorted(GPUS, key=len, reverse=True) if gpu in name), None)


def peak_flops(gpu: str | None, dtype: str) -> float | None:
    """Peak FLOP/s of one GPU for operands of `dtype` ("bf16", "fp32"); None where unknown, as on a CPU."""
    return GPUS[gpu].rates.get(dtype) if gpu in GPUS else None
